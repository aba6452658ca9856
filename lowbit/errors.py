"""Errors for people: each message names the file or the argument, the numbers, and the next step.

LowbitError is the base. A program that calls lowbit can tell a bad argument (UsageError, RecipeError, DeviceError) from
bad data (CheckpointError, DatasetError) and from a request that the engine cannot serve (EngineError).
"""

import difflib
from collections.abc import Iterable

MOST_NAMED = 24  # words in a line of suggestions


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


def nearest(word: object, known: Iterable[str], most: int = 1) -> str:
    """A sentence naming the `most` known words nearest to `word`, or all of them, as far as a line has room."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=most)
    shown = known[:MOST_NAMED] + ["..."] * (len(known) > MOST_NAMED)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(shown)}"
