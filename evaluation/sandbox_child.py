"""The child of evaluation/sandbox.py: gives up its rights, then runs the program on its standard input.

Run as a script by a bare interpreter, so it needs the standard library alone. The system calls that a program may not
make are answered with EPERM by a seccomp filter, a short program for the kernel's packet-filter machine that no process
can take off again (Linux, Documentation/userspace-api/seccomp_filter.rst).
"""

import ctypes
import os
import platform
import resource
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: errno 1, EPERM
ARGUMENTS = 16  # byte offset of a call's arguments, 8 bytes each; its number is at 0, the architecture at 4
FOREIGN_CALLS = 0x40000000  # x86-64 knows every call a second time from here on
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# By machine: the kernel's name for it, calls that are refused (processes, programs, signals, network, changes to files,
# limits and the machine), and calls that open a file with the position of their flags.
MACHINES = {
    "x86_64": (
        0xC000003E,
        (
            *(56, 57, 58, 435, 59, 322),  # clone, fork, vfork, clone3, execve, execveat
            *(62, 200, 234, 424, 101, 311),  # kill, tkill, tgkill, pidfd_send_signal, ptrace, process_vm_writev
            *(41, 42, 53, 425),  # socket, connect, socketpair, io_uring_setup
            *(87, 263, 82, 264, 316, 84, 83, 258),  # unlink, unlinkat, rename, renameat, renameat2, rmdir, mkdir(at)
            *(76, 90, 91, 268, 452, 92, 93, 94, 260),  # truncate, chmod, fchmod, fchmodat, fchmodat2, chown and kin
            *(86, 265, 88, 266, 85, 437),  # link, linkat, symlink, symlinkat, creat, openat2
            *(160, 302, 165, 166, 169, 246, 175, 313, 321),  # setrlimit, prlimit64, mount, umount2, reboot, kexec, bpf
        ),
        ((2, 1), (257, 2)),  # open, openat
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(220, 435, 221, 281),  # clone, clone3, execve, execveat
            *(129, 130, 131, 424, 117, 271),  # kill, tkill, tgkill, pidfd_send_signal, ptrace, process_vm_writev
            *(198, 203, 199, 425),  # socket, connect, socketpair, io_uring_setup
            *(35, 38, 276, 34, 45, 52, 53, 452, 54, 55),  # unlinkat, renameat(2), mkdirat, truncate, chmod, chown, kin
            *(37, 36, 437),  # linkat, symlinkat, openat2
            *(164, 261, 40, 39, 142, 104, 105, 273, 280),  # setrlimit, prlimit64, mount, umount2, reboot, kexec, bpf
        ),
        ((56, 2),),  # openat
    ),
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_program(machine: str) -> bytes:
    """The filter's instructions for `machine`, 8 bytes each: operation, two jump distances, a constant."""
    architecture, refused, openers = MACHINES[machine]
    code = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, 0), (JUMP_ABOVE, 0, 1, FOREIGN_CALLS), (RETURN, 0, 0, REFUSE)]
    for number in refused:
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    for number, position in openers:
        flags = (LOAD, 0, 0, ARGUMENTS + 8 * position)
        code += [(JUMP_EQUAL, 0, 4, number), flags, (JUMP_ANY_BIT, 0, 1, WRITING), (RETURN, 0, 0, REFUSE)]
        code += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *each) for each in (*code, (RETURN, 0, 0, ALLOW)))


def give_up_rights(seconds: int, nbytes: int) -> None:
    """Limit this process for good: memory and processor time, and calls that reach beyond it. OSError where not."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    instructions = filter_program(platform.machine())
    program = _Program(len(instructions) // 8, instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def main(seconds: int, nbytes: int, pipe: int) -> None:
    """Run the program; tell `pipe` the word after it where the program reaches its end, and what stopped it else."""
    program, word = sys.stdin.read().split("\0")
    try:
        give_up_rights(seconds, nbytes)
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except MemoryError:
        os.write(pipe, b"memory")
    except BaseException as error:  # noqa: BLE001  # whatever a program nobody has read may raise
        os.write(pipe, f"{type(error).__name__}: {error}".encode()[:300])
    else:
        os.write(pipe, word.encode())
        os._exit(0)
    os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
