"""Walls that a process sets up around itself for good: namespaces, Landlock, capabilities, limits, seccomp.

Kernels support different ones. seccomp and limits are required, and at least one of the two that hide files
(namespaces, Landlock). With both, a flaw in one leaves the other.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence

from lowbit.evaluation.cell.libc import (
    CAPSET,
    LANDLOCK_ADD,
    LANDLOCK_CREATE,
    LANDLOCK_RESTRICT,
    PIVOT_ROOT,
    call,
    system_call,
)
from lowbit.evaluation.cell.seccomp import PR_SET_NO_NEW_PRIVS, refuse_other_calls

NAMESPACES, LANDLOCK, WRAPPED = "namespaces", "Landlock", "bubblewrap"  # walls that hide files
NOBODY = 65534

# user, mount, PID, network, IPC, host name, cgroups
CLONE_NEW = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
KEPT = 2 | 4 | 8  # nosuid, nodev, noexec: flags that a remount must keep
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24
CAPABILITIES_V3 = 0x20080522

READ_FILE, READ_DIRECTORY, RULE_PATH_BENEATH = 1 << 2, 1 << 3, 1
# First version of Landlock -> number of file rights, network rights, and scopes that it knows.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
NETWORK_RIGHTS, SCOPES = {4: 2}, {6: 2}


def die_with_parent() -> None:
    """Ask the kernel to kill this process if its parent dies."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def readable() -> list[str]:
    """Directories that a contained program may read: Python's own library and the system's libraries."""
    found = (f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
    return [path for path in dict.fromkeys((*found, os.path.dirname(os.__file__))) if os.path.isdir(path)]


def enter_namespaces(empty: str) -> bool:
    """Move this process to namespaces of its own: no other processes, no network, no files except readable().

    empty  a directory to mount the new root on
    The next child becomes the first process of the new PID namespace. Returns False if the kernel refuses.
    """
    user, group = os.geteuid(), os.getegid()
    names = (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1"))
    try:
        call("unshare", CLONE_NEW)
        for name, line in names:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
        _change_root(empty)
    except OSError:
        return False
    return True


def _change_root(empty: str) -> None:
    """Switch to a new root with only readable() in it, mounted read-only."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"none", os.fsencode(empty), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for path in readable():
        inside = os.fsencode(empty + path)
        os.makedirs(inside, exist_ok=True)
        call("mount", os.fsencode(path), inside, None, MS_BIND | MS_REC, None)
        flags = os.statvfs(inside).f_flag & KEPT
        call("mount", None, inside, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | flags, None)
    call("mount", None, os.fsencode(empty), None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    os.chdir(empty)
    system_call(PIVOT_ROOT, b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def enter_landlock() -> bool:
    """Restrict this process to reading readable(), without network and signals. Returns False without kernel
    support."""
    try:
        version = system_call(LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return False
    rights = [(1 << bits) - 1 for bits in (_known(table, version) for table in (FILE_RIGHTS, NETWORK_RIGHTS, SCOPES))]
    attributes = struct.pack("QQQ", *rights)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = system_call(LANDLOCK_CREATE, attributes, size, 0)
    for path in readable():
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        system_call(LANDLOCK_ADD, rules, RULE_PATH_BENEATH, struct.pack("=Qi", READ_FILE | READ_DIRECTORY, beneath), 0)
        os.close(beneath)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    system_call(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return True


def _known(table: dict[int, int], version: int) -> int:
    return max((bits for first, bits in table.items() if version >= first), default=0)


def drop_capabilities() -> None:
    """Drop root's capabilities for this process and every program it starts. No effect for other users."""
    for number in range(64):
        try:
            call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)
        except OSError:  # no capability with this number, or not allowed
            continue
    system_call(CAPSET, struct.pack("Ii", CAPABILITIES_V3, 0), ctypes.create_string_buffer(24))


def limit(seconds: int, nbytes: int) -> None:
    """Limit processor time and memory, forbid growing files, and allow few open ones."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        resource.setrlimit(nothing, (0, 0))


def close_in(standing: Sequence[str], wanted: Sequence[str], seconds: int, nbytes: int) -> list[str]:
    """The active walls of this process: `standing` and those set up here.

    OSError if the kernel supports no seccomp, or nothing that hides files.
    """
    walls = list(standing)
    limit(seconds, nbytes)
    drop_capabilities()
    if LANDLOCK in wanted and enter_landlock():
        walls.append(LANDLOCK)
    if not walls:
        raise OSError(
            "the kernel gives neither user namespaces nor Landlock, so a program could read this user's files"
        )
    refuse_other_calls()
    return [*walls, "seccomp"]
