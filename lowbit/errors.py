"""Errors for people: each message names the file or the argument, the numbers, and the next step.

LowbitError is the base. A program that calls lowbit can tell a bad argument (UsageError, RecipeError, DeviceError) from
bad data (CheckpointError, DatasetError) and from a request that the engine cannot serve (EngineError).
"""


class LowbitError(ValueError):
    """Base of every error whose text is meant for the user. Exit status 2 of the commands."""


class UsageError(LowbitError):
    """An argument or option that makes no sense: an unknown name, a number out of range, two that conflict."""


class RecipeError(UsageError):
    """A recipe that cannot be followed; the message says which key, and what would do."""


class DeviceError(UsageError):
    """A device that does not exist here, or that cannot run what was asked for."""


class CheckpointError(LowbitError):
    """A model or checkpoint that cannot be used: the message names the file, the numbers and the next step."""


class Unfinished(CheckpointError):
    """A run that had to stop through no fault of what it had finished: that is kept, for --resume."""


class DatasetError(LowbitError):
    """A text, prompt or problem file that cannot be used: the message names the file and the row."""


class EngineError(LowbitError):
    """A request that the engine cannot serve. The engine stays usable."""
