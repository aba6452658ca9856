"""Progress of long work, reported to a watcher: steps of a stage, and parts of a step.

Code that works calls `tell`, with or without a watcher.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Progress on the stage `title`: `done` pieces of `total`. `total` is None before it is known."""

    title: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Part:
    """A part of the step under way: `text`, piece `done` of `total`; `total` is 0 if pieces are not counted."""

    text: str
    done: int = 0
    total: int = 0


Watcher = Callable[[Step | Part], None]


def _nobody(event: Step | Part) -> None:
    """Ignore the event."""


WATCHER: ContextVar[Watcher] = ContextVar("watcher", default=_nobody)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """A context in which `tell` calls `watcher`."""
    token = WATCHER.set(watcher)
    try:
        yield
    finally:
        WATCHER.reset(token)


def tell(event: Step | Part) -> None:
    """Report progress to the watcher, if any."""
    WATCHER.get()(event)
