"""Progress of long work, reported to a watcher: steps of a stage, and parts of a step.

Code that works calls `tell`, with or without a watcher.
"""

import time
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


class Stages:
    """A watcher that times stages. Each lasts from the first step with its title to the next stage.

    >>> stages = Stages("imports", time.time() - 2)
    >>> stages(Step("weights", 0, None))
    >>> str(stages)
    '2.00 s: imports 2.00, weights 0.00'
    """

    def __init__(self, title: str, begun: float) -> None:
        """`title` is that of the first stage, `begun` its beginning in seconds since the epoch."""
        self.begun = [(title, begun)]

    def __call__(self, event: Step | Part) -> None:
        if isinstance(event, Step) and event.title != self.begun[-1][0]:
            self.begun.append((event.title, time.time()))

    def __str__(self) -> str:
        """Seconds until now, in all and of each stage."""
        ends = [*(begun for _, begun in self.begun[1:]), time.time()]
        each = ", ".join(f"{title} {end - begun:.2f}" for (title, begun), end in zip(self.begun, ends, strict=True))
        return f"{ends[-1] - self.begun[0][1]:.2f} s: {each}"
