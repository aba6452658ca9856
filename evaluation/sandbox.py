"""Sandbox for generated programs: isolated, limited in time, and judged by a process that they cannot reach.

A bare interpreter (cell/launcher.py) without this process's environment and files starts two processes. One runs the
program; the other runs its tests, which call the program's function through pipes. Each first drops its privileges for
good (cell/walls.py). SECURITY.md lists the guarantees, and the test of each.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lowbit
from lowbit.errors import CheckpointError
from lowbit.evaluation.cell.seccomp import MACHINES
from lowbit.evaluation.cell.walls import LANDLOCK, NAMESPACES, WRAPPED, readable
from lowbit.evaluation.cgroup import memory_group

START = """
import sys
sys.path.append(sys.argv[1])
from lowbit.evaluation.cell.launcher import Settings, main
sys.path.pop()
wanted, standing = (tuple(filter(None, text.split(","))) for text in sys.argv[5:7])
main(int(sys.argv[2]), Settings(int(sys.argv[3]), int(sys.argv[4]), wanted, standing))
"""
SLACK = 2  # seconds of wall clock beyond the program's own, to start and end two interpreters
LOOSE = 128 << 20  # bytes of the control group beyond the program's own, for its judge and the interpreters

# A self-test: it passes if the program runs, all its forbidden attempts fail, and it cannot see the tests.
PROBE = """
import collections, math, os, typing
def attempts():
    tried = (os.fork, os.pipe, lambda: open("file", "w"), lambda: open("/etc/passwd"), lambda: os.kill(os.getppid(), 0))
    done = []
    for attempt in tried:
        try:
            done.append(repr(attempt()))
        except OSError:
            continue
    return done
"""
PROBED = "assert attempts() == [], f'it could do what it must not: {attempts()}'"


@dataclass(frozen=True)
class Limits:
    """Limits of a program.

    seconds  of wall clock, and of processor time
    nbytes   of address space
    """

    seconds: int = 10
    nbytes: int = 1 << 30


@dataclass(frozen=True)
class Program:
    """A program with its tests.

    text         the program
    entry_point  the function that the tests call
    tests        run in another process, where that name calls the function; they pass by reaching their end
    helpers      run before the tests, in the test process
    """

    text: str
    entry_point: str = "main"
    tests: str = ""
    helpers: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result: whether the tests passed, the reason if not, and the walls that were active."""

    passed: bool
    reason: str = ""
    walls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Containment:
    """A way of isolation: walls to set up if the kernel supports them, and whether bubblewrap is used."""

    wanted: tuple[str, ...] = (NAMESPACES, LANDLOCK)
    wrapped: bool = False

    def command(self, limits: Limits) -> list[str]:
        """The command line of the launcher."""
        root = str(Path(lowbit.__file__).parents[1])
        parent, standing = (0, WRAPPED) if self.wrapped else (os.getpid(), "")
        settings = (root, str(parent), str(limits.seconds), str(limits.nbytes), ",".join(self.wanted), standing)
        return [*(_bubblewrap(root) if self.wrapped else ()), sys.executable, "-I", "-S", "-c", START, *settings]


def run_program(program: Program, limits: Limits, containment: Containment | None = None) -> Outcome:
    """The outcome of a program under its tests. It always returns in time, whatever the program does.

    containment  way of isolation; None for the best available
    CheckpointError if the program cannot be isolated; then it was not run.
    """
    containment = containment or best_containment()
    parts = {"program": program.text, "entry_point": program.entry_point}
    order = json.dumps(parts | {"tests": program.tests, "helpers": program.helpers}).encode()
    with tempfile.TemporaryDirectory(prefix="lowbit-") as directory, memory_group(limits.nbytes + LOOSE) as group:
        said = _launched(containment.command(limits), order, directory, limits, group)
    if said is None:
        return Outcome(False, f"longer than {limits.seconds} s")
    try:
        answer = json.loads(said)
    except ValueError:
        return Outcome(False, "its processes were ended from outside, or for lack of memory")
    if "refused" in answer:
        raise CheckpointError(
            f"generated code cannot be contained here ({answer['refused']}), so none is run: that takes Linux with "
            f"seccomp and either user namespaces or Landlock, on {' or '.join(MACHINES)}"
        )
    walls = answer["walls"] + (["a memory cgroup"] if group else [])
    return Outcome(answer["passed"], answer["reason"], tuple(walls))


@cache
def best_containment() -> Containment:
    """Our own namespaces, or those of bubblewrap if the kernel allows them only there."""
    own, wrapped = Containment(), Containment((LANDLOCK,), wrapped=True)
    if shutil.which("bwrap") and NAMESPACES not in require_containment(own, strict=False):
        return wrapped if WRAPPED in require_containment(wrapped, strict=False) else own
    return own


def require_containment(containment: Containment | None = None, strict: bool = True) -> tuple[str, ...]:
    """The walls that hold on this machine, proved by a program that tries forbidden operations.

    CheckpointError if they do not hold; with `strict` False an empty tuple instead.
    """
    try:
        outcome = run_program(Program(PROBE, "attempts", PROBED), Limits(seconds=20), containment)
    except CheckpointError:
        if strict:
            raise
        return ()
    if outcome.passed or not strict:
        return outcome.walls if outcome.passed else ()
    raise CheckpointError(f"generated code cannot be contained here ({outcome.reason}), so none is run")


def _launched(command: list[str], order: bytes, directory: str, limits: Limits, group: Path | None) -> bytes | None:
    """The launcher's output; None if it ran out of time."""
    child = subprocess.Popen(
        command,
        cwd=directory,
        env={"PATH": os.defpath},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        if group is not None:
            (group / "cgroup.procs").write_text(str(child.pid))
        return child.communicate(order, timeout=limits.seconds + SLACK)[0]
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def _bubblewrap(root: str) -> list[str]:
    """bubblewrap's command line: namespaces, and no files except Python's own, the system's libraries, and ours."""
    shown = [word for path in (*readable(), root) for word in ("--ro-bind", path, path)]
    interpreter = [word for path in _interpreter() for word in ("--ro-bind-try", path, path)]
    return ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", *shown, *interpreter, "--dev", "/dev"]


def _interpreter() -> list[str]:
    """Directories of the interpreter, along all links that lead to it."""
    found, at = [], Path(sys.executable)
    while True:
        found += [str(at.parent), str(at.parent.parent / "pyvenv.cfg")]
        if not at.is_symlink():
            return found
        at = at.parent / at.readlink()
