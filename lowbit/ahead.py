"""Overlap of work: items computed ahead of their use, and calls run behind the caller.

Reading, hashing and torch's operations release the interpreter's lock, so threads are enough. The number of items in
memory stays bounded, and results come in order. Several workers share torch's own threads.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
WORKERS = min(os.cpu_count() or 1, 8)


@contextmanager
def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 1) -> Iterator[Iterator[R]]:
    """A context with `function` of each item in order, up to `workers` of them computed ahead of use.

    A context and no generator: one that an exception leaves behind would give torch its threads back when the garbage
    is collected, perhaps in the middle of a product, and products of one and of two threads differ in their last bits.
    """
    pool = ThreadPoolExecutor(workers, "ahead")
    try:
        with fewer_threads(workers):
            yield _in_order(pool, function, items, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def fewer_threads(workers: int) -> Iterator[None]:
    """A context in which torch computes with its threads divided by `workers`, in this thread and in new ones.

    Threads of threads wait for each other by spinning: with two of each on two cores rounding took twice as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(before // workers, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch computes with one thread, in this thread and in new ones: for many small operations, or
    beside workers. Waking others up takes longer than what they would do."""
    with fewer_threads(torch.get_num_threads()):
        yield


class Behind:
    """Runs calls on a thread of its own, in order. A call waits until the one before has finished.

    An error of a call is raised by the next one, or at the end of the context.
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
        """Run `function` with `arguments` on the thread, after the call before has finished."""
        self.wait()
        self._last = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Wait until all calls have finished."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
