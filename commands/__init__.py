"""Console scripts: each parses, calls one function and prints."""
