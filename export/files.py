"""File access in untrusted directories: only regular files are read, and only fresh names are written.

A model directory may contain links to other places, pipes and devices. Only regular files are read, in the directory
itself or, for a snapshot in a hub cache, in that repository's store. Writing never follows a name that existed before.
"""

import fcntl
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from lowbit.errors import CheckpointError

MOST_BYTES = 100_000_000  # of a file that is read as a whole; the largest tokenizers and indexes take a third
CHUNK = 1 << 20  # bytes read at once
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}
TEMPLATES = "additional_chat_templates"  # the only subdirectory that readers look into


# Characters not allowed in file names: they forge lines of SHA256SUMS, move a terminal's cursor, or are not UTF-8.
UNSAYABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Identity:
    """The identity of an unchanged file. A replaced or rewritten file differs, since the change time cannot be set
    back."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def identity_of(found: os.stat_result) -> Identity:
    """The identity from the result of `os.stat`."""
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_regular(path: Path) -> BinaryIO:
    """The file at `path`, open for reading. CheckpointError for a pipe, a device or a directory, without blocking.

    FileNotFoundError if the file does not exist.
    """
    try:
        _require_regular(path, os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, CheckpointError):
        raise
    except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except CheckpointError:
        file.close()
        raise
    return file


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of the file at `path`. CheckpointError if it is not a regular file, or larger than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(f"{path}: {size} bytes, where {most} at most are expected")
        return read_at_most(file, most)


def read_at_most(file: IO[bytes], most: int) -> bytes:
    """The rest of `file`, `most` bytes at most. Memory is taken as bytes come: `read(most)` takes it all at first."""
    held = io.BytesIO()
    while part := file.read(min(CHUNK, most - held.tell())):
        held.write(part)
    return held.getvalue()


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of the file at `path`. CheckpointError as in `read_bytes`, and if it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})") from error


def require_regular(path: Path) -> None:
    """Raise CheckpointError if there is a pipe, a device or the like at `path`, or a link to one."""
    _require_regular(path, path.stat().st_mode)


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: {KINDS.get(stat.S_IFMT(mode), 'something else')}, where a file is expected")


def survey(directory: Path) -> dict[str, Identity]:
    """The identity of every file in a model directory, by name, without hidden files.

    CheckpointError for a pipe, a socket or a device, for an unprintable name, and for a link to a place outside, which
    could expose any file of this machine. A snapshot in a hub cache consists of links into its own repository's store,
    which are allowed.
    """
    home = Path(os.path.realpath(directory))
    places = (home, store) if (store := _store_of(home)) else (home,)
    found = _surveyed(directory, "", places)
    if (directory / TEMPLATES).is_dir():
        found |= _surveyed(directory / TEMPLATES, f"{TEMPLATES}/", places)
    return found


def _store_of(home: Path) -> Path | None:
    """The store of the repository that `home` is a snapshot of, as a hub cache lays them out, or None.

    models--org--name/snapshots/COMMIT holds links into models--org--name/blobs
    """
    repository = home.parent.parent
    is_snapshot = home.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository / "blobs" if is_snapshot else None


def _surveyed(directory: Path, prefix: str, places: tuple[Path, ...]) -> dict[str, Identity]:
    found = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if UNSAYABLE.search(path.name):
            raise CheckpointError(f"{path}: a name with line ends, control characters or broken UTF-8; rename it")
        refuse_link_outside(path, places)
        try:
            status = os.stat(path)
        except FileNotFoundError:  # a dangling link counts as missing
            continue
        if not stat.S_ISDIR(status.st_mode):
            _require_regular(path, status.st_mode)
            found[prefix + path.name] = identity_of(status)
    return found


def refuse_link_outside(path: Path, places: tuple[Path, ...]) -> None:
    """Raise CheckpointError if `path` is a link, or lies behind one, to a place outside of `places`."""
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(place) for place in places):
        raise CheckpointError(
            f"{path}: a link to {target}, outside the model directory; remove it, or put the file itself (or a hard "
            "link to it) in its place"
        )


def is_same(path: Path, identity: Identity) -> bool:
    """True if the file at `path` has this identity."""
    try:
        return identity_of(os.stat(path)) == identity
    except OSError:
        return False


def changed(path: Path) -> str:
    """The error text for a file that changed during a run."""
    return f"{path}: changed while it was read, so the result would be of two models; leave it alone, and run again"


def create(path: Path, directory: int | None = None) -> BinaryIO:
    """A new file at `path` (relative to an open `directory`, if given), for writing. FileExistsError if it exists."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666, dir_fd=directory), "wb")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A context with a new file that replaces `path` when the block succeeds, atomically and durably.

    The file is written under a fresh name in the opened directory, then renamed. If `path` was a link, the link is
    replaced and its target stays unchanged.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fresh = f".{secrets.token_hex(8)}.partial"
    try:
        with create(Path(fresh), directory) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path.name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=directory)
        raise
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: readers see the old or the new content."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """A context for files in `directory`: processes that enter it wait for each other. Do not nest it.

    The lock is on the directory, so no file is made or followed, and the system releases it even if the process is
    killed. On file systems without such locks nobody waits.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
