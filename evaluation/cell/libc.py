"""C library functions and system calls without an equivalent in Python."""

import ctypes
import os
import platform
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
# System call numbers on x86_64 and aarch64; those of Landlock are the same everywhere.
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPSET = {"x86_64": 126, "aarch64": 91}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446


def call(name: str, *arguments: Any) -> int:
    """The result of a C library function. OSError if it is negative."""
    result = int(getattr(LIBC, name)(*map(_wide, arguments)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def system_call(numbers: dict[str, int] | int, *arguments: Any) -> int:
    """The result of a system call with one number, or one per machine. OSError if it fails."""
    number = numbers if isinstance(numbers, int) else numbers.get(platform.machine(), -1)
    return call("syscall", number, *arguments)


def _wide(argument: Any) -> Any:
    """Integers as whole registers: a variadic function reads 64 bits of each."""
    return ctypes.c_long(argument) if isinstance(argument, int) else argument
