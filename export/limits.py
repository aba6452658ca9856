"""Limits of memory and time for a library that computes in this process with numbers from an untrusted file."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError

NO_MEMORY = "can't allocate memory"  # in torch's RuntimeError


class Exceeded(CheckpointError):
    """Memory or time is exhausted."""


class _TimeUp(BaseException):
    """Processor time is used up; no handler of Exception catches it."""


@contextmanager
def limited(
    what: str, nbytes: int, seconds: float, cause: str = "sizes in its configuration are damaged"
) -> Iterator[None]:
    """A context with at most `nbytes` of additional memory and `seconds` of processor time.

    Exceeded for more of either; its message begins with `what` and ends with `cause`. Time is limited only in the main
    thread, where signals are delivered. Such a context may stand inside another.
    """
    reason = f"{what} takes more than {nbytes >> 20} MiB or {seconds:g} s: {cause}"
    try:
        with _memory(nbytes), _time(seconds):
            yield
    except (MemoryError, _TimeUp) as error:
        raise Exceeded(reason) from error
    except RuntimeError as error:
        if NO_MEMORY not in str(error):
            raise
        raise Exceeded(reason) from error


@contextmanager
def _memory(nbytes: int) -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise _TimeUp

    before, left = signal.signal(signal.SIGPROF, end), 0.0
    try:
        left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, left)
        signal.signal(signal.SIGPROF, before)
