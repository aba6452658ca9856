"""Checkpoints on disk: reading, checking and writing, one file per format."""
