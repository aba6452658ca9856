"""Console scripts: each parses, calls one function and prints."""

if __name__ == "commands":
    raise ImportError("the import name is lowbit: write lowbit.commands instead of commands")
