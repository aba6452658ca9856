"""A directory that is either whole or not there.

Everything that a run leaves beside its output begins with a point and the output's name:

    .NAME.lock               held while a run writes NAME
    .NAME.partial-xxxxxxxx   what the run has written so far
    .NAME.replaced-xxxxxxxx  what --overwrite replaces, on file systems that cannot swap two names in one step
    .NAME.result-xxxxxxxx    a finished checkpoint whose place was taken during the run
"""

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lowbit.errors import CheckpointError, Unfinished
from lowbit.export.files import sync
from lowbit.export.snapshot import refuse_to_write_into

TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
CANNOT_SWAP = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
RENAME_EXCHANGE = 2


def refuse_output(output: Path, overwrite: bool) -> None:
    """Raise CheckpointError where `output` cannot become the result: a file, a mount point, not empty, or others'."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: a file is in the way; name another output directory")
    if output.is_dir() and _is_mount_point(place_of(output)):
        raise CheckpointError(f"{output}: a mount point, which cannot be replaced; name a directory inside it")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(f"{output}: not empty; pass --overwrite to replace it, or name another directory")
    refuse_to_write_into(output)


def refuse_to_replace(output: Path, source: Path) -> None:
    """Raise CheckpointError where writing `output` would delete the model in `source`: there, or somewhere below it."""
    target, original = output.resolve(), source.resolve()
    if target == original or target in original.parents:
        raise CheckpointError(f"{output}: the original model is there ({source}); name a directory beside it")


def require_space(output: Path, nbytes: int) -> None:
    """Raise CheckpointError where the disk that `output` is on has less than `nbytes` free."""
    parent = next(path for path in place_of(output).parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{parent}: {free / 1e9:.2f} GB free, about {nbytes / 1e9:.2f} GB needed; make room or name another disk"
        )


def place_of(output: Path) -> Path:
    """Where `output` really lies: a link that stands there stays, and what it leads to becomes the result."""
    return Path(os.path.realpath(output))


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """A block that no other process is in for the same `output`. CheckpointError at once where one is.

    The system lets go of the lock even where the process is killed. A process may enter the block again inside it; on
    the first entry what a killed run left is put in order.
    """
    place = place_of(output)
    path = place.with_name(f".{place.name}.lock")
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"{output}: another run is writing there; wait, or name another directory") from None
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error.strerror}); name another directory") from error
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            _put_in_order(place)
        yield
    finally:
        if outermost:  # unlinked while it is held: whoever opened it meanwhile sees that, and makes another
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `output` that becomes `output` where the block ends well, and vanishes where it does not.

    Whatever stood at `output` stays until that moment. Without `overwrite`, what turns up there meanwhile stays for
    good, and the result is left beside it. A process that is killed outright leaves the sibling, whose name and missing
    config.json say what it is; the next run to the same output removes it.
    """
    with only_run(output):
        refuse_output(output, overwrite)
        place = place_of(output)
        staging = _sibling(place, "partial")
        with _truthful(output, staging.stat().st_ino):
            try:
                yield staging
                _publish(staging, place, overwrite)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise Unfinished(f"{output}: the disk is full ({error}); nothing was written") from error
                raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def told_whole(output: Path) -> Iterator[None]:
    """A block after which nothing is left to write: an interrupt says that `output` is whole."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Interrupted, but {output} was written before that and is whole.") from error


@contextmanager
def _truthful(output: Path, inode: int) -> Iterator[None]:
    """The same where `output` is the directory with that inode number; else an interrupt is only that."""
    try:
        yield
    except KeyboardInterrupt:
        if output.exists() and output.stat().st_ino == inode:
            with told_whole(output):
                raise
        raise


def _sibling(place: Path, kind: str) -> Path:
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{place.name}.{kind}-", dir=place.parent))
        made.chmod(0o755)
    except OSError as error:
        raise CheckpointError(f"{place.parent}: cannot be written to ({error.strerror})") from error
    return made


def _siblings(place: Path, kind: str) -> list[Path]:
    """What `_sibling` made, by earlier runs too: names are compared, for a name may be a pattern."""
    wanted = re.compile(rf"{re.escape(f'.{place.name}.{kind}-')}[a-z0-9_]+")
    return [path for path in place.parent.iterdir() if wanted.fullmatch(path.name)]


def _put_in_order(place: Path) -> None:
    """Put back what a killed run had moved out of its way, where nothing took its place; remove the rest it left."""
    replaced = _siblings(place, "replaced")
    if replaced and not (place.exists() and any(place.iterdir())):
        latest = max(replaced, key=lambda path: path.stat().st_mtime_ns)
        latest.rename(place)
    for stale in (*_siblings(place, "replaced"), *_siblings(place, "partial")):
        shutil.rmtree(stale, ignore_errors=True)


def _publish(staging: Path, place: Path, overwrite: bool) -> None:
    """Give `staging` the name `place`. What --overwrite replaces ends up at `staging`, or nowhere."""
    sync(staging)
    if overwrite and place.is_dir() and any(place.iterdir()):
        _swap(staging, place)
    else:
        try:
            staging.rename(place)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            aside = _sibling(place, "result")
            staging.rename(aside)
            raise Unfinished(
                f"{place}: something was put there during the run, and stays; the finished checkpoint is in {aside}"
            ) from error
    sync(place.parent)


def _swap(staging: Path, place: Path) -> None:
    """Let two directories change names: in one step, or, where the file system cannot, in two that can be undone."""
    if exchange(staging, place):
        return
    old = _sibling(place, "replaced")
    place.rename(old)
    try:
        staging.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change names in one step. False, and nothing done, where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    here = -100  # AT_FDCWD
    if library.renameat2(here, os.fsencode(one), here, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _is_mount_point(place: Path) -> bool:
    """True if a disk, or a bound directory, is mounted at `place`."""
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines() if mounts.exists() else []
    return place.is_mount() or str(place) in {_unescaped(line.split()[4]) for line in lines}


def _unescaped(field: str) -> str:
    r"""A path of mountinfo, whose blanks are written \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
