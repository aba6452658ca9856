"""Regular expressions that a file brings, matched in bounded time.

Python's own `re` has no limit: `(a+)+$` runs for longer than anybody waits. `regex` reads the same syntax, and has one.
"""

from functools import cache
from time import thread_time

import regex

SECONDS = 5.0  # of processor time for all that is matched of one file
LONGEST = 1000  # characters of a pattern, and of what it is matched with; real ones have a few dozen


class PatternError(ValueError):
    """A pattern that cannot be read, or that takes too long; the message quotes it."""


class Patterns:
    """The patterns of one file, which have `seconds` of processor time together (SECONDS), from now on."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = thread_time() + (SECONDS if seconds is None else seconds)

    def begins(self, pattern: str, text: str) -> bool:
        """True if `text` begins with what `pattern` fits. PatternError where that cannot be told in time."""
        return self._fits(pattern, text, anchored=True)

    def occurs(self, pattern: str, text: str) -> bool:
        """True if `pattern` fits anywhere in `text`. PatternError where that cannot be told in time."""
        return self._fits(pattern, text, anchored=False)

    def _fits(self, pattern: str, text: str, anchored: bool) -> bool:
        if max(len(pattern), len(text)) > LONGEST:
            raise PatternError(f"{pattern[:60]!r}: patterns and names of at most {LONGEST} characters are matched")
        compiled, left = _compiled(pattern), self._end - thread_time()
        try:
            if left > 0:
                return (compiled.match if anchored else compiled.search)(text, timeout=left) is not None
        except TimeoutError:
            pass
        raise PatternError(f"{pattern[:60]!r} takes too long to match")


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise PatternError(f"{pattern[:60]!r} is no regular expression ({error})") from error
