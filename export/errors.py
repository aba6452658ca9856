"""The one exception whose text is meant for the person at the keyboard."""


class CheckpointError(ValueError):
    """A model or checkpoint that cannot be used: the message names the file, the numbers and the next step."""
