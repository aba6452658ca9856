"""Errors for people: each message names the file or the argument, the numbers, and the next step.

LowbitError is the base. A program that calls lowbit can tell a bad argument (UsageError, RecipeError, DeviceError) from
bad data (CheckpointError, DatasetError) and from a request that the engine cannot serve (EngineError).
"""


class LowbitError(ValueError):
    """Base of every error whose text is meant for the user. Exit status 2 of the commands."""


class UsageError(LowbitError):
    """A bad argument or option: an unknown name, a number out of range, two options that conflict."""


class RecipeError(UsageError):
    """A recipe that cannot be followed. The message names the key and a value that works."""


class DeviceError(UsageError):
    """A device that does not exist on this machine, or cannot run the request."""


class CheckpointError(LowbitError):
    """A model or checkpoint that cannot be used: the message names the file, the numbers and the next step."""


class Unfinished(CheckpointError):
    """A run that stopped early. Its finished blocks are valid and kept for --resume."""


class DatasetError(LowbitError):
    """A text, prompt or problem file that cannot be used: the message names the file and the row."""


class EngineError(LowbitError):
    """A request that the engine cannot serve. The engine stays usable."""
