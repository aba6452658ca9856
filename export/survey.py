"""One pass over all weights of a checkpoint: hashes, and a check for NaN and infinity."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from lowbit.ahead import Behind, one_thread
from lowbit.errors import CheckpointError, Unfinished
from lowbit.export.checkpoint import Checkpoint, verify_checksums
from lowbit.export.files import changed, identity_of, open_regular
from lowbit.export.tensorfile import TensorEntry

PIECE = 1 << 22  # bytes per read; a multiple of every dtype's size
READERS = 4  # concurrent files: hashing takes one core each and counting another, and disks need several requests


def survey(checkpoint: Checkpoint, on_bytes: Callable[[int], None] = lambda count: None) -> dict[str, str]:
    """SHA-256 of every weight file, by name.

    on_bytes  called with the number of bytes just read; never concurrently

    CheckpointError for a wrong checksum, and for NaN or infinite values, with the tensor's name and their count.
    Unfinished if a file changes during the pass.
    """
    files: dict[Path, list[TensorEntry]] = {}
    for entry in checkpoint.entries.values():
        files.setdefault(entry.path, []).append(entry)
    told = Lock()

    def tell(count: int) -> None:
        with told:
            on_bytes(count)

    with ThreadPoolExecutor(READERS) as readers, one_thread():
        read = list(readers.map(lambda path: _read(path, files[path], tell), files))
    sums = {path.name: digest for path, (digest, _) in zip(files, read, strict=True)}
    verify_checksums(checkpoint, sums)
    for _, broken in read:
        if broken is not None:
            raise CheckpointError(broken)
    return sums


def _read(path: Path, entries: Iterable[TensorEntry], tell: Callable[[int], None]) -> tuple[str, str | None]:
    """The SHA-256 of a file, and a complaint about its first tensor with bad values, or None."""
    digest, complaint = hashlib.sha256(), None
    buffers = cycle((bytearray(PIECE), bytearray(PIECE)))
    with open_regular(path) as file, Behind() as behind:  # a piece is hashed while the next one is read
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
            behind(digest.update, file.read(entry.offset - file.tell()))
            broken, left = 0, entry.nbytes
            while left:
                piece = memoryview(next(buffers))[: min(left, PIECE)]
                if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                    raise Unfinished(changed(path))
                behind(digest.update, piece)
                broken += count_broken(torch.frombuffer(piece, dtype=torch.uint8).view(entry.dtype))
                left -= len(piece)
                tell(len(piece))
            complaint = complaint or (what_is_broken(entry.name, broken, entry.numel) if broken else None)
        if identity_of(os.fstat(file.fileno())) != entry.identity:
            raise Unfinished(changed(path))
    return digest.hexdigest(), complaint


def what_is_broken(name: str, count: int, numel: int) -> str:
    """The error text for a tensor with `count` bad values."""
    return f"{name}: {count} of {numel} values are NaN or infinite; the weights are damaged"


def checked(name: str, value: Tensor) -> Tensor:
    """`value` if all of it is finite. CheckpointError names the tensor and counts bad values."""
    broken = count_broken(value)
    if broken:
        raise CheckpointError(what_is_broken(name, broken, value.numel()))
    return value


def count_broken(value: Tensor) -> int:
    """The number of NaN and infinite values, counted in pieces: the largest tensors barely fit in memory once.

    A piece is first tested by its minimum and maximum, which is 50 times as fast as testing each value.
    """
    if not value.is_floating_point():
        return 0
    narrow = value.element_size() == 1  # torch has no arithmetic for float8
    pieces = (piece.float() if narrow else piece for piece in value.flatten().split(PIECE // value.element_size()))
    return sum(int((~torch.isfinite(piece)).sum()) for piece in pieces if not _finite(piece))


def _finite(piece: Tensor) -> bool:
    return not piece.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(piece))).all())
