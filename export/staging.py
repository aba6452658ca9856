"""Atomic creation of outputs, directories or single files: complete or absent.

All other files and directories that a run creates start with a dot and the output's name:

    .NAME.lock               held while a run writes NAME
    .NAME.partial-xxxxxxxx   staging directory of a run
    .NAME.replaced-xxxxxxxx  directory replaced by --overwrite, on file systems without an atomic exchange of names
    .NAME.result-xxxxxxxx    a finished checkpoint whose name was taken during the run
"""

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lowbit.errors import CheckpointError, Unfinished
from lowbit.export.files import sync
from lowbit.export.snapshot import refuse_to_write_into

TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
CANNOT_SWAP = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
CANNOT_LINK = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
RENAME_EXCHANGE = 2


def refuse_output(output: Path, overwrite: bool, alone: bool = False) -> None:
    """Raise CheckpointError if `output` cannot become the result: a file, a mount point, not empty, or others'
    (`refuse_to_write_into`).

    alone  the result is a single file
    """
    if alone:
        _refuse_file(output, overwrite)
        return
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: a file is in the way; name another output directory")
    if output.is_dir() and _is_mount_point(place_of(output)):
        raise CheckpointError(f"{output}: a mount point, which cannot be replaced; name a directory inside it")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(f"{output}: not empty; pass --overwrite to replace it, or name another directory")
    refuse_to_write_into(output)


def _refuse_file(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_file():
        raise CheckpointError(f"{output}: no file, and cannot become one; name another")
    if output.exists() and not overwrite:
        raise CheckpointError(f"{output}: exists; pass --overwrite to replace it, or name another file")
    refuse_to_write_into(output.parent)


def refuse_to_replace(output: Path, *sources: Path) -> None:
    """Raise CheckpointError if writing `output` would delete the model in one of `sources`, there or below."""
    for source in sources:
        target, original = output.resolve(), source.resolve()
        if target == original or target in original.parents:
            raise CheckpointError(f"{output}: the original model is there ({source}); name another place")


def require_space(output: Path, nbytes: int) -> None:
    """Raise CheckpointError if the disk of `output` has less than `nbytes` free."""
    parent = next(path for path in place_of(output).parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{parent}: {free / 1e9:.2f} GB free, about {nbytes / 1e9:.2f} GB needed; make room or name another disk"
        )


def place_of(output: Path) -> Path:
    """The real path of `output`. A link to a directory is kept, and its target is replaced."""
    return Path(os.path.realpath(output))


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """A context that holds the lock of `output`. CheckpointError at once if another process holds it.

    The system releases the lock even if the process is killed. The context may be nested. The outermost one first
    cleans up after a killed run.
    """
    place = place_of(output)
    path = place.with_name(f".{place.name}.lock")
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):  # a lock that cannot be made looks like one that is held
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
        if outermost:  # removed while held: a process that has it open notices, and creates another
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def staged(output: Path, overwrite: bool, alone: str | None = None) -> Iterator[Path]:
    """A temporary sibling of `output` that becomes `output` if the block succeeds, and is deleted if it fails.

    alone  name of the file in it that becomes `output` in its place

    An existing `output` stays until then. Without `overwrite`, an `output` that appears during the run is kept, and the
    result stays under another name. A killed process leaves the sibling, which has no config.json; the next run to the
    same output deletes it.
    """
    with only_run(output):
        refuse_output(output, overwrite, alone is not None)
        place = place_of(output)
        staging = _sibling(place, "partial")
        result, inodes = staging if alone is None else staging / alone, {staging.stat().st_ino}
        with _truthful(output, inodes):
            try:
                yield staging
                inodes.add(result.stat().st_ino)
                _publish(result, place, overwrite)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise Unfinished(f"{output}: the disk is full ({error}); nothing was written") from error
                raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def told_whole(output: Path) -> Iterator[None]:
    """A context after all writing: an interrupt reports that `output` is complete."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Interrupted, but {output} was written before that and is whole.") from error


@contextmanager
def _truthful(output: Path, inodes: Container[int]) -> Iterator[None]:
    """The same if `output` has one of those inode numbers. Otherwise an interrupt is passed on."""
    try:
        yield
    except KeyboardInterrupt:
        if output.exists() and output.stat().st_ino in inodes:
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
    """Directories made by `_sibling`, also in earlier runs. Names are compared, not globbed: a name may contain
    wildcards."""
    wanted = re.compile(rf"{re.escape(f'.{place.name}.{kind}-')}[a-z0-9_]+")
    return [path for path in place.parent.iterdir() if wanted.fullmatch(path.name)]


def _put_in_order(place: Path) -> None:
    """Restore a directory that a killed run had moved away, if nothing took its place, and delete the run's
    leftovers."""
    replaced = _siblings(place, "replaced")
    if replaced and not (place.exists() and any(place.iterdir())):
        latest = max(replaced, key=lambda path: path.stat().st_mtime_ns)
        latest.rename(place)
    for stale in (*_siblings(place, "replaced"), *_siblings(place, "partial")):
        shutil.rmtree(stale, ignore_errors=True)


def _publish(result: Path, place: Path, overwrite: bool) -> None:
    """Rename `result`, a directory or a file, to `place`. A directory replaced by --overwrite ends up at `result`, or
    is deleted."""
    sync(result)
    if overwrite and place.is_file():
        result.replace(place)
    elif overwrite and place.is_dir() and any(place.iterdir()):
        _swap(result, place)
    else:
        try:
            _rename_to_new(result, place)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            aside = _sibling(place, "result")
            kept = aside / place.name if result.is_file() else aside
            result.rename(kept)
            raise Unfinished(
                f"{place}: something was put there during the run, and stays; the finished checkpoint is in {kept}"
            ) from error
    sync(place.parent)


def _rename_to_new(result: Path, place: Path) -> None:
    """Rename `result` to `place`. OSError if there is a file or a directory that is not empty."""
    if result.is_file():  # rename would replace a file
        try:
            os.link(result, place)
        except OSError as error:
            if error.errno not in CANNOT_LINK or place.exists():
                raise
            result.rename(place)
    else:
        result.rename(place)


def _swap(staging: Path, place: Path) -> None:
    """Exchange the names of two directories, atomically, or by two renames with a rollback if the file system
    cannot."""
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
    """Exchange the names of two directories atomically. False, without any change, if the system cannot."""
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
    """True if a file system or a bind mount is mounted at `place`."""
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines() if mounts.exists() else []
    return place.is_mount() or str(place) in {_unescaped(line.split()[4]) for line in lines}


def _unescaped(field: str) -> str:
    r"""A path of mountinfo with its octal escapes (\040 for a blank) decoded."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
