"""Matching of untrusted regular expressions in bounded time.

Python's `re` has no time limit: `(a+)+$` can run for hours. The package `regex` has the same syntax, and a limit.
"""

from functools import cache
from time import thread_time

import regex

SECONDS = 5.0  # of processor time for all matches of one file
LONGEST = 1000  # characters of a pattern or a text; real ones have a few dozen


class PatternError(ValueError):
    """A pattern that is invalid or takes too long. The message quotes it."""


class Patterns:
    """Patterns of one file, with `seconds` (default SECONDS) of processor time in total, from construction on."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = thread_time() + (SECONDS if seconds is None else seconds)

    def begins(self, pattern: str, text: str) -> bool:
        """True if `pattern` matches at the start of `text`. PatternError after the time limit."""
        return self._fits(pattern, text, anchored=True)

    def occurs(self, pattern: str, text: str) -> bool:
        """True if `pattern` matches anywhere in `text`. PatternError after the time limit."""
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
