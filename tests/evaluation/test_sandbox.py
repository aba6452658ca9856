"""Programs nobody has read: what passes, what is contained, and that nothing outlives its time."""

import os
import time

import psutil
import pytest

from lowbit.errors import CheckpointError
from lowbit.evaluation.sandbox import Limits, Outcome, require_containment, run_program

LIMITS = Limits(seconds=2, nbytes=1 << 29)

CONTAINED = {
    "a loop": ("while True: pass", "longer than 2 s"),
    "a sleep": ("import time; time.sleep(3600)", "longer than 2 s"),
    "one huge list": ("x = [0] * (1 << 33)", "more than 512 MiB of memory"),
    "a growing list": ("x = []\nwhile True: x.append(bytes(10_000_000))", "more than 512 MiB of memory"),
    "a fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "a program": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "a thread": ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
    "another's death": ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "PermissionError"),
    "a connection": ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    "more rights": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1)); x = bytes(1 << 30)", ""),
    "a crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "no end": ("def f(): f()\nf()", "RecursionError"),
    "no Python": ("def (", "SyntaxError"),
    "an early end": ("import sys; sys.exit(0)", "SystemExit"),
    "a sudden end": ("import os; os._exit(0)", "it ended before its tests did"),
    "a wrong answer": ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    "a flood": ("while True: print('x' * 1000)", "longer than 2 s"),
    "a flood of every pipe": (
        "import os\nwhile True:\n for i in range(32):\n  try: os.write(i, b'x' * 9999)\n  except OSError: pass",
        "longer than 2 s",
    ),
}


@pytest.mark.parametrize("what", CONTAINED)
def test_it_is_contained_and_named(what, tmp_path):
    program, reason = CONTAINED[what]
    begun = time.monotonic()
    outcome = run_program(program, LIMITS)
    assert not outcome.passed
    assert reason in outcome.reason
    assert time.monotonic() - begun < LIMITS.seconds + 10
    assert not psutil.Process().children()


@pytest.mark.parametrize(
    "attempt", ["open('{0}', 'w')", "import os; os.remove('{0}')", "import os; os.rename('{0}', 'x')"]
)
def test_no_file_is_changed(attempt, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    outcome = run_program(attempt.format(kept), LIMITS)
    assert "PermissionError" in outcome.reason
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]


def test_a_right_program_passes():
    program = "import math, re, collections, itertools, heapq\nassert math.gcd(12, 18) == 6\nprint('done')"
    assert run_program(program, Limits(seconds=60)) == Outcome(True)
    require_containment()


def test_it_sees_nothing_of_this_process(monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    assert run_program("import os\nassert 'SECRET' not in os.environ", Limits(seconds=60)).passed
    assert run_program(
        f"import os\nassert os.getcwd() != {os.getcwd()!r} and not os.listdir()", Limits(seconds=60)
    ).passed


def test_a_system_that_does_not_contain_is_refused(monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.sandbox.PROBE", "raise SystemExit('it could do what it must not')")
    with pytest.raises(CheckpointError, match=r"cannot be contained here .*so none is run"):
        require_containment()


def test_every_machine_has_a_whole_filter():
    from lowbit.evaluation.sandbox_child import MACHINES, filter_program

    for machine in MACHINES:
        instructions = filter_program(machine)
        assert len(instructions) % 8 == 0
        assert len(instructions) // 8 < 4096  # the kernel's limit
