"""Checkpoints on disk: reading, verifying and writing, with one file per format."""

if __name__ == "export":
    raise ImportError("the import name is lowbit: write lowbit.export instead of export")
