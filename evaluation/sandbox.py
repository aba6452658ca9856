"""Running a program that nobody has read: behind walls, in time, and judged by a process that it cannot reach.

A bare interpreter (cell/launcher.py) starts two processes, without this process's environment and files: one runs the
program, the other its tests, which call the program's function through pipes. Each first gives up for good what it
could do harm with (cell/walls.py). SECURITY.md says what then holds, and how each promise is tested.
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
SLACK = 2  # seconds of wall clock beside the program's own: two interpreters start and end
LOOSE = 128 << 20  # bytes of a control group beside the program's own: its judge, and interpreters

# Tests that pass where the program works, cannot do what it tries, and is not told of the tests.
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
    """What a program may use.

    seconds  of wall clock, and of processor time
    nbytes   of address space
    """

    seconds: int = 10
    nbytes: int = 1 << 30


@dataclass(frozen=True)
class Program:
    """What is run, and what judges it.

    text         the program
    entry_point  the function of it that the tests call
    tests        run in another process, where that name calls the program's function; they pass by reaching their end
    helpers      run before the tests, in their process
    """

    text: str
    entry_point: str = "main"
    tests: str = ""
    helpers: str = ""


@dataclass(frozen=True)
class Outcome:
    """True if the tests passed, in a few words why not, and behind which walls the program ran."""

    passed: bool
    reason: str = ""
    walls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Containment:
    """How programs are held: walls that are put up where the kernel gives them, and whether bubblewrap puts up some."""

    wanted: tuple[str, ...] = (NAMESPACES, LANDLOCK)
    wrapped: bool = False

    def command(self, limits: Limits) -> list[str]:
        """The command line of the launcher."""
        root = str(Path(lowbit.__file__).parents[1])
        parent, standing = (0, WRAPPED) if self.wrapped else (os.getpid(), "")
        settings = (root, str(parent), str(limits.seconds), str(limits.nbytes), ",".join(self.wanted), standing)
        return [*(_bubblewrap(root) if self.wrapped else ()), sys.executable, "-I", "-S", "-c", START, *settings]


def run_program(program: Program, limits: Limits, containment: Containment | None = None) -> Outcome:
    """The outcome of a program under its tests. Whatever it does, this returns in time.

    containment  how it is held; None for the best that there is here
    Raises CheckpointError where it cannot be held, and has not been run.
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
    """Own namespaces; where the kernel gives none to us but bubblewrap has them, bubblewrap's."""
    own, wrapped = Containment(), Containment((LANDLOCK,), wrapped=True)
    if shutil.which("bwrap") and NAMESPACES not in require_containment(own, strict=False):
        return wrapped if WRAPPED in require_containment(wrapped, strict=False) else own
    return own


def require_containment(containment: Containment | None = None, strict: bool = True) -> tuple[str, ...]:
    """The walls that hold programs here, proved by a program that tries what it must not.

    Raises CheckpointError where they do not hold; none of them where `strict` is False.
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
    """What the launcher says; None where its time ran out."""
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
    """bubblewrap's command line: namespaces, and no files but Python's own, the system's libraries, and ours."""
    shown = [word for path in (*readable(), root) for word in ("--ro-bind", path, path)]
    interpreter = [word for path in _interpreter() for word in ("--ro-bind-try", path, path)]
    return ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", *shown, *interpreter, "--dev", "/dev"]


def _interpreter() -> list[str]:
    """Where the interpreter lies, and all that its links lead through."""
    found, at = [], Path(sys.executable)
    while True:
        found += [str(at.parent), str(at.parent.parent / "pyvenv.cfg")]
        if not at.is_symlink():
            return found
        at = at.parent / at.readlink()
