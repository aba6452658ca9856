"""Reports about checkpoints: facts gathered from their files, shown as an HTML page, Markdown, and JSON."""
