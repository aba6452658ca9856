"""Allow-list of system calls for contained programs. All others fail with EPERM.

The filter is a BPF program for the kernel. It cannot be removed for the life of the process (Linux,
Documentation/userspace-api/seccomp_filter.rst).

The allowed calls read files, query the process itself, wait, or manage its memory. None creates a process, a thread, a
file, a socket or another descriptor with memory, and none reaches another process.
"""

import ctypes
import os
import platform
import struct
from dataclasses import dataclass

from lowbit.evaluation.cell.libc import call

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: errno 1, EPERM
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # byte offsets in the filter's input; each argument takes 8 bytes

READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECTORY | os.O_NOFOLLOW | 0o100000 | 0o400000
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 1030
TCGETS, TCGETS2, FIOCLEX = 0x5401, 0x802C542A, 0x5451  # isatty; close on exec

# Per machine: the kernel's identifier, and the numbers of the allowed calls.
MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0,
            "write": 1,
            "open": 2,
            "close": 3,
            "stat": 4,
            "fstat": 5,
            "lstat": 6,
            "poll": 7,
            "lseek": 8,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "mremap": 25,
            "madvise": 28,
            "futex": 202,
            "rt_sigaction": 13,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
            "sigaltstack": 131,
            "restart_syscall": 219,
            "ioctl": 16,
            "fcntl": 72,
            "dup": 32,
            "dup2": 33,
            "dup3": 292,
            "pread64": 17,
            "readv": 19,
            "writev": 20,
            "access": 21,
            "faccessat": 269,
            "faccessat2": 439,
            "openat": 257,
            "newfstatat": 262,
            "statx": 332,
            "readlink": 89,
            "readlinkat": 267,
            "getdents64": 217,
            "getcwd": 79,
            "uname": 63,
            "sysinfo": 99,
            "select": 23,
            "pselect6": 270,
            "ppoll": 271,
            "nanosleep": 35,
            "clock_nanosleep": 230,
            "pause": 34,
            "alarm": 37,
            "setitimer": 38,
            "getitimer": 36,
            "sched_yield": 24,
            "sched_getaffinity": 204,
            "getpid": 39,
            "gettid": 186,
            "getppid": 110,
            "getuid": 102,
            "getgid": 104,
            "geteuid": 107,
            "getegid": 108,
            "clock_gettime": 228,
            "clock_getres": 229,
            "gettimeofday": 96,
            "time": 201,
            "times": 100,
            "getrusage": 98,
            "getrlimit": 97,
            "prlimit64": 302,
            "getrandom": 318,
            "exit": 60,
            "exit_group": 231,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "read": 63,
            "write": 64,
            "close": 57,
            "fstat": 80,
            "lseek": 62,
            "mmap": 222,
            "mprotect": 226,
            "munmap": 215,
            "brk": 214,
            "mremap": 216,
            "madvise": 233,
            "futex": 98,
            "restart_syscall": 128,
            "rt_sigaction": 134,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
            "sigaltstack": 132,
            "ioctl": 29,
            "fcntl": 25,
            "dup": 23,
            "dup3": 24,
            "pread64": 67,
            "readv": 65,
            "writev": 66,
            "faccessat": 48,
            "faccessat2": 439,
            "openat": 56,
            "newfstatat": 79,
            "statx": 291,
            "readlinkat": 78,
            "getdents64": 61,
            "getcwd": 17,
            "uname": 160,
            "sysinfo": 179,
            "pselect6": 72,
            "ppoll": 73,
            "nanosleep": 101,
            "clock_nanosleep": 115,
            "setitimer": 103,
            "getitimer": 102,
            "sched_yield": 124,
            "sched_getaffinity": 123,
            "getpid": 172,
            "gettid": 178,
            "getppid": 173,
            "getuid": 174,
            "getgid": 176,
            "geteuid": 175,
            "getegid": 177,
            "clock_gettime": 113,
            "clock_getres": 114,
            "gettimeofday": 169,
            "times": 153,
            "getrusage": 165,
            "getrlimit": 163,
            "prlimit64": 261,
            "getrandom": 278,
            "exit": 93,
            "exit_group": 94,
        },
    ),
}


@dataclass(frozen=True)
class OneOf:
    """A check that the lower half (or the upper half, with `upper`) of argument `position` is one of `values`."""

    position: int
    values: tuple[int, ...]
    upper: bool = False

    def code(self) -> list[tuple[int, int, int, int]]:
        """BPF instructions that refuse the call, or fall through."""
        tests = [(JUMP_EQUAL, len(self.values) - i, 0, value) for i, value in enumerate(self.values)]
        return [(LOAD, 0, 0, ARGUMENTS + 8 * self.position + 4 * self.upper), *tests, (RETURN, 0, 0, REFUSE)]


@dataclass(frozen=True)
class Within:
    """A check that argument `position` has no bits outside `bits`."""

    position: int
    bits: int

    def code(self) -> list[tuple[int, int, int, int]]:
        """BPF instructions that refuse the call, or fall through."""
        load = (LOAD, 0, 0, ARGUMENTS + 8 * self.position)
        return [load, (JUMP_ANY_BIT, 0, 1, ~self.bits & 0xFFFFFFFF), (RETURN, 0, 0, REFUSE)]


# Further checks on allowed calls: files are opened read-only, limits are read but not set.
CHECKS: dict[str, tuple[OneOf | Within, ...]] = {
    "open": (Within(1, READING),),
    "openat": (Within(2, READING),),
    "fcntl": (OneOf(1, (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC)),),
    "ioctl": (OneOf(1, (TCGETS, TCGETS2, FIOCLEX)),),
    "prlimit64": (OneOf(0, (0,)), OneOf(2, (0,)), OneOf(2, (0,), upper=True)),
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_program(machine: str) -> bytes:
    """The filter's instructions for `machine`, 8 bytes each: operation, two jump offsets, a constant.

    A call with another architecture's numbering kills the process. x86-64's second numbering (x32) is not listed, and
    so refused. KeyError if `machine` is not in MACHINES.
    """
    architecture, numbers = MACHINES[machine]
    code = [(LOAD, 0, 0, ARCHITECTURE), (JUMP_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for name, number in numbers.items():
        rule = [each for check in CHECKS.get(name, ()) for each in check.code()] + [(RETURN, 0, 0, ALLOW)]
        code += [(JUMP_EQUAL, 0, len(rule), number), *rule]
    return b"".join(struct.pack("HBBI", *each) for each in (*code, (RETURN, 0, 0, REFUSE)))


def refuse_other_calls() -> None:
    """Install the filter on this process for good. OSError if the machine or the kernel does not support it."""
    if platform.machine() not in MACHINES:
        raise OSError(f"no list of system calls for {platform.machine()}, only for {' and '.join(MACHINES)}")
    instructions = filter_program(platform.machine())
    program = _Program(len(instructions) // 8, instructions)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
