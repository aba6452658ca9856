"""Writing a checkpoint directory so that it is either whole or not there."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from export.checkpoint import INDEX_NAME, SINGLE_NAME, SUMS_NAME
from export.errors import CheckpointError
from export.tensorfile import TensorFileWriter

# Everything a model directory may hold beside its weights that readers of the quantized one need too.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*")
NOT_COMPANIONS = ("config.json", INDEX_NAME, SUMS_NAME, "*.index.json", "quantize_config.json", "requirements.txt")


class ShardedWriter:
    """Writes tensors as they come into `model-0000i-of-0000N.safetensors` and an index, or one model.safetensors.

    directory        where; it must exist
    max_shard_bytes  a file is closed before it would grow beyond this (a single larger tensor gets a file of its own)
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self._done: list[tuple[Path, list[str]]] = []
        self._open: TensorFileWriter | None = None
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._open and self._open.nbytes and self._open.nbytes + nbytes > self.max_shard_bytes:
            self._close_shard()
        if self._open is None:
            self._open = TensorFileWriter(self.directory / f"shard-{len(self._done):05d}")
        self._open.add(name, tensor)
        self._total += nbytes

    def _close_shard(self) -> None:
        if self._open is not None:
            self._open.close()
            self._done.append((self._open.path, self._open.names()))
            self._open = None

    def finish(self) -> None:
        """Give the files their final names and write the index where there are several."""
        self._close_shard()
        count = len(self._done)
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._done, start=1):
            final = SINGLE_NAME if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            write_json(self.directory / INDEX_NAME, {"metadata": {"total_size": self._total}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path, with_code: bool) -> list[str]:
    """Names of the tokenizer, template, generation and licence files copied; *.py too where `with_code`."""
    patterns = COMPANIONS + (("*.py",) if with_code else ())
    skipped = {path for pattern in NOT_COMPANIONS for path in source.glob(pattern)}
    files = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()} - skipped
    for path in sorted(files):
        shutil.copyfile(path, target / path.name)
    return sorted(path.name for path in files)


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
    _sync(staging)
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
    _sync(output.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
