"""Checkpoints on disk: reading, checking and writing, one file per format."""

if __name__ == "export":
    raise ImportError("the import name is lowbit: write lowbit.export instead of export")
