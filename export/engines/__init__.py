"""Which engines run a checkpoint: one file for each, with the version that its rules were read from."""
