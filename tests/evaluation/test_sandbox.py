"""Untrusted programs, by the lines of SECURITY.md: those that pass, attempts that each wall stops, forged verdicts."""

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from lowbit.errors import CheckpointError
from lowbit.evaluation.cell import seccomp
from lowbit.evaluation.cell.values import pack, unpack
from lowbit.evaluation.cell.walls import LANDLOCK, NAMESPACES, WRAPPED
from lowbit.evaluation.sandbox import Containment, Limits, Outcome, Program, require_containment, run_program

ROOT = Path(__file__).parents[2]
LIMITS = Limits(seconds=1, nbytes=1 << 29)
PATIENT = Limits(seconds=60)
# Ways to hide files: each alone, and both, which is the default.
HOLDS = {
    "both": Containment(),
    "namespaces": Containment((NAMESPACES,)),
    "Landlock": Containment((LANDLOCK,)),
    "bubblewrap": Containment((), wrapped=True),
}
# Forbidden attempts of a program: `tried` collects the results of those that were not refused.
ATTEMPTS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def system_call(*arguments):
    result = libc.syscall(*map(ctypes.c_long, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def succeeded(*attempts):
    done = []
    for attempt in attempts:
        try:
            done.append(repr(attempt())[:100])
        except OSError:
            continue
    return done
"""


@pytest.fixture(params=HOLDS)
def hold(request):
    """Each way of hiding files in turn, skipped if this kernel lacks it."""
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    containment = HOLDS[request.param]
    wanted = {WRAPPED} if containment.wrapped else set(containment.wanted)
    try:
        walls = run_program(Program("def main(): pass"), PATIENT, containment).walls
    except CheckpointError as error:
        if "neither user namespaces nor Landlock" not in str(error):
            raise
        walls = ()
    if not wanted <= set(walls):
        pytest.skip(f"not on this kernel, which gives {walls}")
    return containment


def outcome_of(text, containment=None, limits=LIMITS, tests="main()"):
    return run_program(Program(text, tests=tests), limits, containment)


def assert_nothing_succeeds(attempts, containment, before=""):
    """None of `attempts`, expressions that Python evaluates, does anything but raise OSError."""
    listed = ", ".join(f"lambda: {attempt}" for attempt in attempts)
    text = f"{ATTEMPTS}\n{before}\ndef main():\n    return succeeded({listed})\n"
    assert outcome_of(text, containment, PATIENT, "found = main()\nassert found == [], found") == Outcome(
        True, "", require_containment(containment)
    )


CONTAINED = {
    "a loop": ("while True: pass", "longer than 1 s"),
    "a sleep": ("import time; time.sleep(3600)", "longer than 1 s"),
    "one huge list": ("x = [0] * (1 << 33)", "more than 512 MiB of memory"),
    "a growing list": ("x = []\nwhile True: x.append(bytes(10_000_000))", "more than 512 MiB of memory"),
    "a fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "a program": ("import os; os.execv('/bin/true', ['true'])", "Error"),
    "a thread": ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
    "a connection": ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    "more rights": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", ""),
    "a crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "no end": ("def f(): f()\nf()", "RecursionError"),
    "no Python": ("def (", "SyntaxError"),
    "an early end": ("import sys; sys.exit(0)", "SystemExit"),
    "a sudden end": ("import os; os._exit(0)", "it ended before its tests did"),
    "a wrong answer": ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    "no function": ("x = 1", "NameError: the program defines no main"),
    "a flood": ("while True: print('x' * 1000)", "longer than 1 s"),
    "a flood of every pipe": (
        "import os\nwhile True:\n for i in range(32):\n  try: os.write(i, b'x' * 9999)\n  except OSError: pass",
        "",
    ),
}


@pytest.mark.parametrize("what", CONTAINED)
def test_it_is_contained_and_named(what):
    program, reason = CONTAINED[what]
    before, begun = psutil.Process().children(), time.monotonic()
    outcome = outcome_of(program)
    assert not outcome.passed
    assert reason in outcome.reason
    assert time.monotonic() - begun < LIMITS.seconds + 10
    assert psutil.Process().children() == before


def test_a_right_program_passes():
    text = "import math, re, collections, itertools, heapq, decimal\ndef main(): return math.gcd(12, 18)\nprint('done')"
    assert outcome_of(text, None, PATIENT, "assert main() == 6").passed
    assert require_containment()


def test_every_way_of_hiding_files_holds(hold):
    assert "seccomp" in require_containment(hold)


def test_without_anything_that_hides_files_nothing_runs(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be contained here .*neither user namespaces nor Landlock"):
        outcome_of("", Containment(()))


def test_a_system_that_does_not_contain_is_refused(monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.sandbox.PROBE", "def attempts(): return ['open']")
    with pytest.raises(CheckpointError, match=r"cannot be contained here .*could do what it must not.*so none is run"):
        require_containment()


# System calls.

FOREIGN = {"x86_64": 0xC00000B7, "aarch64": 0xC000003E}


def decide(machine, number, arguments=(0,) * 6, architecture=None):
    """The answer of the filter for `machine`: its instructions are interpreted here."""
    architecture = architecture or seccomp.MACHINES[machine][0]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *arguments)
    program = list(struct.iter_unpack("HBBI", seccomp.filter_program(machine)))
    at, value = 0, 0
    while True:
        operation, yes, no, constant = program[at]
        at += 1
        if operation == seccomp.LOAD:
            value = struct.unpack_from("<I", data, constant)[0]
        elif operation == seccomp.RETURN:
            return constant
        else:
            holds = value == constant if operation == seccomp.JUMP_EQUAL else value & constant
            at += yes if holds else no


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_only_listed_calls_pass_the_filter(machine):
    listed = {number: name for name, number in seccomp.MACHINES[machine][1].items()}
    good = {"fcntl": (0, seccomp.F_GETFD), "ioctl": (0, seccomp.TCGETS)}
    for number in range(1024):
        arguments = (*good.get(listed.get(number), ()), *(0,) * 6)[:6]
        assert decide(machine, number, arguments) == (seccomp.ALLOW if number in listed else seccomp.REFUSE)
        assert decide(machine, number | 0x40000000, arguments) == seccomp.REFUSE  # x32
        assert decide(machine, number, arguments, FOREIGN[machine]) == seccomp.KILL
    assert len(seccomp.filter_program(machine)) // 8 < 4096  # the kernel's limit


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_listed_calls_pass_with_harmless_arguments_alone(machine):
    numbers = seccomp.MACHINES[machine][1]
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_TMPFILE, os.O_PATH, 0o20000):
        assert decide(machine, numbers["openat"], (0, 0, flag, 0, 0, 0)) == seccomp.REFUSE
    assert decide(machine, numbers["openat"], (0, 0, os.O_CLOEXEC, 0, 0, 0)) == seccomp.ALLOW
    for command in (4, 8, 10, 15, 1024, 1031, 1033):  # F_SETFL, F_SETOWN, F_SETSIG, F_SETOWN_EX, leases, pipes, seals
        assert decide(machine, numbers["fcntl"], (0, command, 0, 0, 0, 0)) == seccomp.REFUSE
    assert decide(machine, numbers["ioctl"], (0, 0x5412, 0, 0, 0, 0)) == seccomp.REFUSE  # TIOCSTI: typing for the user
    limits = numbers["prlimit64"]
    assert decide(machine, limits) == seccomp.ALLOW
    for arguments in ((1, 0, 0), (0, 0, 1), (0, 0, 1 << 32)):
        assert decide(machine, limits, (*arguments, 0, 0, 0)) == seccomp.REFUSE


def test_the_kernel_refuses_every_call_that_is_not_listed(hold):
    listed = set(seccomp.MACHINES[platform.machine()][1].values())
    probes = {335, 336} if platform.machine() == "x86_64" else set()  # the kernel's own traps, which end the caller
    numbers = [number for number in range(600) if number not in listed | probes]
    text = f"""{ATTEMPTS}
def main():
    found = []
    for number in {numbers} + [number + 0x40000000 for number in {numbers}]:
        try:
            found.append((number, system_call(number, 0, 0, 0, 0, 0, 0)))
        except PermissionError:
            continue
    return found
"""
    outcome = outcome_of(text, hold, PATIENT, "assert main() == [], main()")
    assert outcome.passed, outcome.reason


# Other processes.


def test_no_other_process_is_signalled(hold):
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for process in (victim.pid, os.getpid()):
            attempts = [f"os.kill({process}, 9)", "os.kill(-1, 9)", "os.killpg(0, 9)", "signal.pidfd_send_signal(0, 9)"]
            attempts += [
                f"system_call({number}, {process}, {process}, 9, 0)" for number in (200, 234, 297)
            ]  # tkill and kin
            attempts += [f"system_call(129, {process}, 9, ctypes.addressof(information))"]  # rt_sigqueueinfo
            attempts += [f"fcntl.fcntl(0, fcntl.F_SETOWN, {process})", "fcntl.fcntl(0, 10, 9)"]  # F_SETSIG
            assert_nothing_succeeds(attempts, hold, "import fcntl, signal\ninformation = (ctypes.c_int * 32)(9, 0, -1)")
        time.sleep(0.1)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_no_other_process_is_looked_into(hold, monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    me = os.getpid()
    attempts = [f"open('/proc/{me}/{name}', 'rb').read()" for name in ("environ", "maps", "mem", "cmdline")]
    attempts += [f"os.listdir('/proc/{me}/fd')", "open('/proc/self/environ', 'rb').read()", f"os.pidfd_open({me})"]
    assert_nothing_succeeds(attempts, hold)
    assert outcome_of(
        "import os\ndef main(): return dict(os.environ)", hold, tests="assert 'SECRET' not in main()"
    ).passed


def test_it_dies_with_its_parent(hold):
    """A parent that is killed at once, while the program sleeps."""
    start = (
        f"run_program(Program('import time; time.sleep(999)'), Limits(999), Containment({hold.wanted}, {hold.wrapped}))"
    )
    code = f"from lowbit.evaluation.sandbox import *\n{start}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    least = 4 if hold.wrapped else 5  # the launcher, and two processes of each cell
    _wait_until(lambda: len(psutil.Process(parent.pid).children(recursive=True)) >= least, 60)
    time.sleep(0.3)
    started = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _wait_until(lambda: not any(_runs(process) for process in started), 10)


def _runs(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _wait_until(holds, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


# Files, network, memory.


def test_no_file_is_read_or_changed(hold, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    changes = ["open({0!r}, 'w')", "open({0!r}, 'a')", "open({0!r}, 'r+')", "os.truncate({0!r}, 0)", "os.utime({0!r})"]
    changes += ["os.remove({0!r})", "os.rename({0!r}, {1!r})", "os.link({0!r}, {1!r})", "os.symlink({0!r}, {1!r})"]
    changes += ["os.mkdir({1!r})", "os.mknod({1!r}, 0o100644)", "os.mkfifo({1!r})", "os.chmod({0!r}, 0o777)"]
    changes += ["os.chown({0!r}, 1, 1)", "os.setxattr({0!r}, 'user.a', b'b')", "open('here', 'w')", "os.mkdir('here')"]
    changes += [
        "open({0!r}).read()",
        "open('/etc/passwd').read()",
        "os.listdir({2!r})",
        "os.listdir('/etc')",
        "os.chroot('.')",
    ]
    paths = str(kept), str(tmp_path / "made"), str(tmp_path)
    assert_nothing_succeeds([change.format(*paths) for change in changes], hold)
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]


def test_no_handle_opens_a_file(hold, tmp_path):
    """root could open a file by its number in the file system, without a path."""
    before = "handle = ctypes.create_string_buffer(128)\nat = ctypes.c_int()"
    attempts = ["system_call(303, -100, b'/etc', ctypes.addressof(handle), ctypes.addressof(at), 0)"]
    attempts += ["system_call(304, -100, ctypes.addressof(handle), 0)"]
    assert_nothing_succeeds([each.replace("b'/etc'", "ctypes.addressof(handle)") for each in attempts], hold, before)


def test_no_network(hold):
    families = ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"]
    attempts = [f"socket.socket(socket.{family}, socket.SOCK_DGRAM)" for family in families]
    assert_nothing_succeeds([*attempts, "socket.socketpair()"], hold, "import socket")


def test_no_memory_is_held_outside_the_limit(hold):
    """Not in files without a name, in pipes, in shared memory or in message queues."""
    attempts = ["os.memfd_create('x')", "os.pipe()", "os.eventfd(0)", "os.open('/dev/shm', os.O_TMPFILE | os.O_RDWR)"]
    assert_nothing_succeeds(attempts, hold)
    shared = "import mmap\nheld = [mmap.mmap(-1, 1 << 26) for _ in range(16)]"
    outcome = outcome_of(shared, hold)
    assert not outcome.passed
    assert "OSError: [Errno 12]" in outcome.reason or "memory" in outcome.reason


def test_root_has_no_powers(hold):
    """Nothing of CAP_* is left, in the process or in what it could run."""
    attempts = ["os.setuid(0)", "os.setgid(0)", "os.setgroups([])", "os.nice(-1)", "time.clock_settime(0, 1.0)"]
    attempts += ["socket.sethostname('x')", "system_call(272, 0x10000000)", "system_call(165, 0, 0, 0, 0, 0)"]
    assert_nothing_succeeds(attempts, hold, "import socket, time")


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user; as any other user all tests are this one"
)
def test_it_holds_for_a_plain_user(tmp_path):
    """The same probe as the user nobody, who may not run this interpreter."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    asked = [python, "-c", "import sys; raise SystemExit(sys.version_info < (3, 11))"] if python else ["false"]
    if subprocess.run(asked, user=65534, check=False, cwd="/").returncode or not os.access(ROOT, os.X_OK):
        pytest.skip("no interpreter that another user may run")
    visible = tmp_path / "code"
    shutil.copytree(
        ROOT / "evaluation", visible / "lowbit" / "evaluation", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("__init__.py", "errors.py", "extras.py"):
        shutil.copy(ROOT / "lowbit" / name, visible / "lowbit")
    for directory in (visible, *visible.parents):
        if directory.stat().st_mode & 0o005 != 0o005 and directory.is_relative_to(tempfile.gettempdir()):
            directory.chmod(0o755)
    code = "from lowbit.evaluation.sandbox import *\nprint(*require_containment())"
    done = subprocess.run(
        [python, "-c", code], user=65534, group=65534, cwd=visible, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "seccomp" in done.stdout
    assert LANDLOCK in done.stdout or NAMESPACES in done.stdout


# The verdict.

FORGERIES = {
    "the frames around it": """
import sys
frame, found = sys._getframe(), []
while frame:
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
        found.append(value)
    frame = frame.f_back
import os
for i in range(32):
    try: os.write(i, b'{"reason": ""}\\n{"passed": true, "reason": "", "walls": []}\\n')
    except OSError: pass
def main(): return 41
""",
    "an answer before it is asked": """
import os
for i in range(32):
    try: os.write(i, b'{"value": null, "arguments": ["list"]}\\n{"value": ["int", "0x29"], "arguments": ["list"]}\\n')
    except OSError: pass
os._exit(0)
""",
    "an object that equals everything": """
class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True
def main(): return Yes()
""",
    "a number that equals everything": """
class Yes(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def main(): return Yes(41)
""",
    "the tests in its memory": """
import gc
def main():
    for each in gc.get_objects():
        if isinstance(each, dict) and '4' + '2 is right' in repr(each): return 42
    return 41
""",
    "another meaning of assert": """
import builtins
builtins.AssertionError = Exception
builtins.compile = builtins.exec = lambda *a, **k: None
def main(): return 41
""",
    "an end that looks well": "import os\ndef main(): os._exit(0)",
    "an exception without a word": "def main(): raise RuntimeError",
    "an exception that says gone": "def main(): raise RuntimeError('gone')",
    "a class without a name": "def main(): raise type('', (Exception,), {})",
    "an end of the loop of tests": "def main(): raise StopIteration",
}


@pytest.mark.parametrize("how", FORGERIES)
def test_no_verdict_is_forged(how):
    outcome = outcome_of(FORGERIES[how], tests="assert all(map(lambda right: main() == right, [42])), '42 is right'")
    assert not outcome.passed
    assert outcome.reason


def test_tests_see_what_the_function_did():
    text = """
class Odd(Exception): pass
def main(numbers, *, step=1, fail=None):
    if fail: raise {"odd": Odd, "value": ValueError}[fail]("no")
    numbers.append(step)
    return (x * step for x in numbers)
"""
    tests = """
numbers = [1, 2]
assert list(main(numbers, step=3)) == [3, 6, 9] and numbers == [1, 2, 3]
for name, kind in (("value", ValueError), ("odd", Odd)):
    try: main([], fail=name)
    except kind as error: assert str(error) == "no"
    else: assert False
"""
    program = Program(text, tests=tests, helpers="class Odd(Exception): pass\n")
    outcome = run_program(program, PATIENT)
    assert outcome.passed, outcome.reason


@pytest.mark.parametrize(
    "value",
    [None, True, "\ud800\x1b", 1 << 20000, -3, 1.5, float("inf"), -0.0, 2j, b"\xff", bytearray(b"a"), range(3, 9, 2)],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_pass_unchanged(value):
    for nested in (value, [value], (value, [value]), {"a": value}, {1: (value,)}):
        found = unpack(json.loads(json.dumps(pack(nested))))
        assert found == nested
        assert type(found) is type(nested)


def test_sets_and_keys_pass_and_subclasses_become_plain():
    class Shouting(str):
        pass

    value = {(1, 2): {3}, frozenset({4}): Shouting("a")}
    found = unpack(json.loads(json.dumps(pack(value))))
    assert found == value
    assert {type(each) for each in found.values()} == {set, str}
    with pytest.raises(TypeError, match="a object is no plain value"):
        pack(object())
