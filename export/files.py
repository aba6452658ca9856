"""Files in directories that somebody else may have prepared: read where they are files, written under fresh names.

A model directory may hold links to files elsewhere, pipes and devices. What is read is a regular file, in the directory
itself or in a hub cache's store. What is written never goes through a name that was there before.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lowbit.errors import CheckpointError

MOST_BYTES = 100_000_000  # of a file that is read whole; the largest tokenizers and indexes take a third of it
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}
TEMPLATES = "additional_chat_templates"  # the one directory inside a model's that readers look into


# In a name: what ends or forges a line of SHA256SUMS, moves a terminal's cursor, or cannot be written as UTF-8.
UNSAYABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Identity:
    """What tells a file from one that took its place or its content: nobody sets the time of a change back."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def identity_of(found: os.stat_result) -> Identity:
    """The identity in what `os.stat` found."""
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_regular(path: Path) -> BinaryIO:
    """The file at `path`, open for reading. CheckpointError at once where it is a pipe, a device or a directory.

    FileNotFoundError where nothing is there.
    """
    try:
        _require_regular(path, os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a ValueError is a name with a zero byte
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except CheckpointError:
        file.close()
        raise
    return file


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of the file at `path`. CheckpointError where it is no file, or larger than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(f"{path}: {size} bytes, where {most} at most are expected")
        return file.read(most)


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of the file at `path`. CheckpointError as in `read_bytes`, and where it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: {KINDS.get(stat.S_IFMT(mode), 'something else')}, where a file is expected")


def survey(directory: Path) -> dict[str, Identity]:
    """The identity of every file in a model directory, by its name; hidden files are nobody's.

    Raises CheckpointError where there is a pipe, a socket or a device, where a name cannot be said, and where a link
    leads outside: what such a link names could be anything on this machine, and would be read or carried into the
    output. Links into a hub cache's store are how that cache is made.
    """
    found = _surveyed(directory, "")
    if (directory / TEMPLATES).is_dir():
        found |= _surveyed(directory / TEMPLATES, f"{TEMPLATES}/")
    return found


def _surveyed(directory: Path, prefix: str) -> dict[str, Identity]:
    home = Path(os.path.realpath(directory))
    found = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if UNSAYABLE.search(path.name):
            raise CheckpointError(f"{path}: a name with line ends, control characters or broken UTF-8; rename it")
        refuse_link_outside(path, home)
        try:
            status = os.stat(path)
        except FileNotFoundError:  # a link to a file that was deleted: to readers there is no such file
            continue
        if not stat.S_ISDIR(status.st_mode):
            _require_regular(path, status.st_mode)
            found[prefix + path.name] = identity_of(status)
    return found


def refuse_link_outside(path: Path, home: Path) -> None:
    """Raise CheckpointError where `path` is a link that leads neither into `home` nor into a hub cache's store."""
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))
    is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not (target.is_relative_to(home) or is_blob):
        raise CheckpointError(
            f"{path}: a link to {target}, outside the model directory; remove it, or put the file itself (or a hard "
            "link to it) in its place"
        )


def is_same(path: Path, identity: Identity) -> bool:
    """True if the file at `path` is the one of that identity, unchanged."""
    try:
        return identity_of(os.stat(path)) == identity
    except OSError:
        return False


def changed(path: Path) -> str:
    """What is said of a file that changed under a run."""
    return f"{path}: changed while it was read, so the result would be of two models; leave it alone, and run again"


def create(path: Path, directory: int | None = None) -> BinaryIO:
    """A new file at `path` (in an open `directory`, where one is given), for writing; FileExistsError where one is."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666, dir_fd=directory), "wb")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, for writing, that stands at `path` once the block ends well, whole and durable.

    It is made under a fresh name in the directory as it was opened. What stood at `path`, a link included, is replaced
    by one rename; a link's target stays as it is.
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
    """Put `text` at `path`: it holds the old content or the new, whole."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
