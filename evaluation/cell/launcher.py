"""The launcher: starts the program's process and the judge's, each behind its own walls, and reports the verdict.

It never runs code of the program. Standard input and output are one JSON object each:

program, entry_point, helpers, tests  ->  passed, reason, walls;  or  refused: the reason why nothing was run

The program's process is forked before the tests are read, so that they are not in its memory.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lowbit.evaluation.cell.judge import GONE, MEMORY, judge
from lowbit.evaluation.cell.walls import NAMESPACES, close_in, die_with_parent, enter_namespaces
from lowbit.evaluation.cell.worker import work

MOST = 1 << 16  # most bytes read from a process behind walls


@dataclass(frozen=True)
class Settings:
    """Settings of both processes.

    seconds, nbytes  limits of processor time and memory
    wanted           walls to set up if the kernel supports them
    standing         walls that are already active
    """

    seconds: int
    nbytes: int
    wanted: tuple[str, ...]
    standing: tuple[str, ...]


def main(parent: int, settings: Settings) -> None:
    """Run the order from standard input. `parent` is the process that must still be alive; 0 if it is not visible."""
    die_with_parent()
    if parent and os.getppid() != parent:
        return
    os.write(1, json.dumps(_run(settings)).encode())
    os.killpg(0, signal.SIGKILL)  # all that was started here, and this process


def _run(settings: Settings) -> dict[str, Any]:
    asked, ask = os.pipe()
    replied, reply = os.pipe()
    ready, stand = os.pipe()
    ordered, order = os.pipe()
    judged, verdict = os.pipe()
    worker = _start(settings, stand, [asked, reply], lambda: work(os.fdopen(asked, "rb"), os.fdopen(reply, "wb")))
    court = _start(settings, stand, [ordered, ask, replied, verdict], lambda: _judge(ordered, ask, replied, verdict))
    for descriptor in (asked, replied, reply, stand, ordered, verdict):
        os.close(descriptor)
    reports = [json.loads(line) for line in _all_of(ready).splitlines()]
    refusals = [report["refused"] for report in reports if "refused" in report]
    if refusals or len(reports) < 2:
        return {"refused": refusals[0] if refusals else "a process ended while its walls were put up"}
    parts = json.load(sys.stdin)
    _tell(ask, {name: parts[name] for name in ("program", "entry_point")})
    _tell(order, {name: parts[name] for name in ("entry_point", "helpers", "tests")})
    reason = _reason(_all_of(judged), worker, court, settings)
    return {
        "passed": reason is None,
        "reason": reason or "",
        "walls": [wall for wall in reports[0]["walls"] if wall in reports[1]["walls"]],
    }


def _judge(ordered: int, ask: int, replied: int, verdict: int) -> None:
    order = json.loads(_all_of(ordered, None))
    reason = judge(order, os.fdopen(ask, "wb"), os.fdopen(replied, "rb"))
    os.write(verdict, json.dumps({"reason": reason and reason[:300]}).encode())


def _reason(said: bytes, worker: int, court: int, settings: Settings) -> str | None:
    """The reason why the program does not pass, or None. A process that ended early: how it ended."""
    reason: str | None = json.loads(said)["reason"] if said else GONE
    if reason is None:
        return None
    if reason == MEMORY or reason.startswith("MemoryError"):
        return _memory(settings)
    return _fate(worker if said else court, settings) if reason == GONE else reason


def _fate(cell: int, settings: Settings) -> str:
    """The way in which a process ended, in a few words. Waits for its end."""
    _, status, used = os.wait4(cell, 0)
    if not os.WIFSIGNALED(status):
        return "it ended before its tests did"
    number = os.WTERMSIG(status)
    if number in (signal.SIGXCPU, signal.SIGKILL):
        spent = used.ru_utime + used.ru_stime >= settings.seconds - 0.5
        return f"longer than {settings.seconds} s of processor time" if spent else _memory(settings)
    return f"killed by {signal.Signals(number).name}"


def _memory(settings: Settings) -> str:
    return f"more than {settings.nbytes >> 20} MiB of memory"


def _start(settings: Settings, stand: int, kept: Sequence[int], act: Callable[[], None]) -> int:
    """The PID of a new process that runs `act` behind walls, with only the descriptors `kept`.

    It reports on `stand` its walls, or the reason why there are none. Without walls it runs nothing.
    """
    cell = os.fork()
    if cell:
        return cell
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        _keep_only([*kept, stand])
        die_with_parent()
        standing = list(settings.standing)
        if NAMESPACES in settings.wanted and enter_namespaces(os.getcwd()):
            standing.append(NAMESPACES)
            die_with_parent()  # the kernel resets this on entering namespaces
        inner = os.fork()
        if inner:
            _keep_only([])
            _share_fate(inner)
        _enter(settings, standing, stand)
        act()
        os._exit(0)
    except OSError as error:
        os.write(stand, json.dumps({"refused": str(error)}).encode() + b"\n")
    finally:
        os._exit(1)


def _enter(settings: Settings, standing: list[str], stand: int) -> None:
    die_with_parent()
    walls = close_in(standing, settings.wanted, settings.seconds, settings.nbytes)
    os.write(stand, json.dumps({"walls": walls}).encode() + b"\n")
    os.close(stand)


def _share_fate(child: int) -> None:
    """Wait for `child`, then end in the same way."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), os.WTERMSIG(status))
        time.sleep(1)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _keep_only(kept: Sequence[int]) -> None:
    """Close all descriptors except `kept` and 0, 1, 2."""
    edges = [2, *sorted(kept), 1 << 20]
    for low, high in pairwise(edges):
        os.closerange(low + 1, high)


def _all_of(descriptor: int, most: int | None = MOST) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read(-1 if most is None else most)


def _tell(descriptor: int, message: dict[str, Any]) -> None:
    """Write one line of JSON. A missing reader is detected later."""
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        return
