"""Work beside other work: tensors read before they are asked for, checks on several threads, writing behind the work.

Reading, hashing and torch's operations let go of the interpreter's lock, so threads are enough. What is held in memory
at once stays bounded, and results come in order.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
WORKERS = min(os.cpu_count() or 1, 4)


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 1) -> Iterator[R]:
    """`function` of each item in order, up to `workers` of them computed before they are asked for."""
    pool = ThreadPoolExecutor(workers, "ahead")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Behind:
    """Runs what it is given on a thread of its own, in order, one call ahead of it at most: the next one waits.

    An error of such a call is raised by the next one, or at the end of the context.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "behind")
        self._last: Future[None] | None = None

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, function: Callable[..., None], *arguments: object) -> None:
        """Let `function` run with `arguments`, once what was given before has run."""
        self.wait()
        self._last = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Wait until everything given has run."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
