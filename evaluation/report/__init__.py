"""What is known of a checkpoint, gathered from its files, and shown: a page to look at, Markdown, and JSON."""
