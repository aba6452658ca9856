"""Running a program that nobody has read: a process of its own that may do little, and that ends.

The child (sandbox_child.py) is a fresh interpreter in an empty directory, without this process's environment. Before it
runs the program it gives up for good: memory and processor time beyond its share, and every system call that starts a
process or a thread, signals another, opens a socket, or changes a file. Its output goes nowhere. The parent kills it
when its wall clock is over.

This contains accidents. It is no jail for an enemy: the child may read what its user may read.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from lowbit.errors import CheckpointError
from lowbit.evaluation import sandbox_child

# A right program, which must pass; and it must not be able to do what it tries.
PROBE = """
import collections, math, os, typing
for attempt in (os.fork, lambda: open("file", "w"), lambda: os.kill(os.getppid(), 0)):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit("it could do what it must not")
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    seconds  of wall clock, and of processor time
    nbytes   of address space
    """

    seconds: int = 10
    nbytes: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and in a few words why not."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: Limits) -> Outcome:
    """The outcome of a Python program that passes by reaching its end. Whatever it does, this returns in time."""
    word = secrets.token_hex(16)  # only a program that ran to its end has it told
    with tempfile.TemporaryDirectory(prefix="lowbit-") as directory:
        listen, tell = os.pipe()
        try:
            status = _run_child(f"{program.replace(chr(0), '')}\0{word}", limits, directory, tell)
            said = _told(listen)
        finally:
            os.close(listen)
            os.close(tell)
    if status is None:
        return Outcome(False, f"longer than {limits.seconds} s")
    if status == 0 and said == word:
        return Outcome(True)
    return Outcome(False, _reason(status, said, limits))


def require_containment() -> None:
    """Raise CheckpointError where this system does not hold programs as promised."""
    outcome = run_program(PROBE, Limits(seconds=20))
    if not outcome.passed:
        raise CheckpointError(
            f"generated code cannot be contained here ({outcome.reason}), so none is run: that takes Linux with "
            f"seccomp on {' or '.join(sandbox_child.MACHINES)}"
        )


def _run_child(text: str, limits: Limits, directory: str, pipe: int) -> int | None:
    """The child's exit status, negative for a signal; None where its time ran out."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", sandbox_child.__file__, str(limits.seconds), str(limits.nbytes), str(pipe)],
        cwd=directory,
        env={"PATH": os.defpath},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(pipe,),
        start_new_session=True,
    )
    try:
        child.communicate(text.encode("utf-8", "replace"), timeout=limits.seconds + 2)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return child.returncode


def _told(pipe: int) -> str:
    """What the child told, which is short; nothing where it told nothing."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 4096).decode(errors="replace")
    except BlockingIOError:
        return ""


def _reason(status: int, said: str, limits: Limits) -> str:
    if said == "memory":
        return f"more than {limits.nbytes >> 20} MiB of memory"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"longer than {limits.seconds} s of processor time"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return said or "it ended before its tests did"
