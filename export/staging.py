"""A directory that is either whole or not there."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import CheckpointError


def refuse_output(output: Path, overwrite: bool) -> None:
    """Raise CheckpointError where `output` cannot become the result: a file, or not empty and not to be overwritten."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: a file is in the way; name another output directory")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(f"{output}: not empty; pass --overwrite to replace it, or name another directory")


def refuse_to_replace(output: Path, source: Path) -> None:
    """Raise CheckpointError where writing `output` would delete the model in `source`: there, or somewhere below it."""
    target, original = output.resolve(), source.resolve()
    if target == original or target in original.parents:
        raise CheckpointError(f"{output}: the original model is there ({source}); name a directory beside it")


def require_space(output: Path, nbytes: int) -> None:
    """Raise CheckpointError where the disk that `output` is on has less than `nbytes` free."""
    parent = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{parent}: {free / 1e9:.2f} GB free, about {nbytes / 1e9:.2f} GB needed; make room or name another disk"
        )


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `output` that becomes `output` where the block ends well, and vanishes where it does not.

    Whatever stood at `output` stays until that moment. A process that is killed outright leaves the sibling, whose name
    (`.NAME.partial-*`) and missing config.json say what it is; the next run to the same output removes it.
    """
    refuse_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in output.parent.glob(f".{output.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        staging.chmod(0o755)
        yield staging
        _publish(staging, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{output}: the disk is full ({error}); nothing was written") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, output: Path) -> None:
    sync(staging)
    if output.exists():
        old = staging.with_name(staging.name + ".old")
        output.rename(old)
        try:
            staging.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(output)
    sync(output.parent)


def sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
