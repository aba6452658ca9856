"""A control group that limits the total memory of its processes, if this user may create one."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PATIENCE = 2.0  # seconds to wait for killed processes


@contextmanager
def memory_group(nbytes: int) -> Iterator[Path | None]:
    """A context with a new group inside this process's own, limited to `nbytes` without swap; None if it cannot be
    created."""
    group = next((made for parent in _parents() if (made := _made(parent, nbytes)) is not None), None)
    try:
        yield group
    finally:
        if group is not None:
            _remove(group)


def _parents() -> Iterator[Path]:
    """Directories of this process's own group: of the memory controller (v1), or of all controllers (v2)."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                yield ROOT / "memory" / path.lstrip("/")
            elif not controllers:
                yield ROOT / path.lstrip("/")


def _made(parent: Path, nbytes: int) -> Path | None:
    group = parent / f"lowbit-{os.getpid()}-{secrets.token_hex(4)}"
    first = "memory.limit_in_bytes" if (parent / "memory.limit_in_bytes").exists() else "memory.max"
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        (group / first).write_text(str(nbytes))
    except OSError:
        group.rmdir()
        return None
    with suppress(OSError):  # no swap, or swap without accounting
        (group / "memory.swap.max").write_text("0")
    return group


def _remove(group: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            group.rmdir()
            return
        except OSError:  # killed processes are still exiting
            time.sleep(0.01)
