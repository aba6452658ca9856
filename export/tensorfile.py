"""Safetensors files read and written a tensor at a time, so that no file is ever whole in memory.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The
header is checked in full before any byte of data is believed (format: huggingface/safetensors, README "Format").
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` at byte `offset` of `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name, from its header alone.

    Raises CheckpointError where the file is truncated, where the header is no safetensors header, or where tensors
    overlap, leave gaps, or have bytes that contradict dtype and shape.
    """
    size = path.stat().st_size
    header, start = _read_header(path, size)
    entries = [_entry(path, name, spec, start) for name, spec in header.items() if name != "__metadata__"]
    position = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} starts at byte {entry.offset}, the one before it ends at {position}: "
                "overlapping or missing data; the file is damaged"
            )
        position += entry.nbytes
    if position != size:
        raise CheckpointError(
            f"{path}: {size} bytes on disk, {position} promised by its header: the file is truncated or damaged; "
            "download or copy it again"
        )
    return {entry.name: entry for entry in entries}


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: {size} bytes, but its header alone should take {length}: not a safetensors file, or truncated"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error}): the file is damaged") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: its header is a JSON {type(header).__name__}, not an object: the file is damaged"
        )
    return header, 8 + length


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError where a key stands in it twice: one reader would take the first, another the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands in it twice")
        found[key] = value
    return found


def _entry(path: Path, name: str, spec: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = DTYPES[spec["dtype"]], tuple(map(index, spec["shape"])), spec["data_offsets"]
        entry = TensorEntry(name, path, dtype, shape, start + index(begin), index(end) - index(begin))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name!r} makes no sense ({spec!r})") from error
    if min(shape, default=0) < 0 or entry.nbytes != entry.numel * dtype.itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {spec['dtype']} {list(shape)} has {entry.nbytes} bytes, not "
            f"{entry.numel * dtype.itemsize}: the file is damaged"
        )
    return entry


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor of `entry`, in memory of its own (nothing stays mapped)."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    buffer = bytearray(entry.nbytes)
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        got = file.readinto(buffer)
    if got != entry.nbytes:
        raise CheckpointError(f"{entry.path}: {entry.nbytes} bytes of {entry.name!r} expected, {got} read")
    return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype).reshape(entry.shape)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class TensorFileWriter:
    """Writes one safetensors file as its tensors arrive.

    The data goes to `path` + ".data" first, because the header that precedes it is complete only at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._data_path = path.with_name(path.name + ".data")
        self._data = self._data_path.open("wb")

    def add(self, name: str, tensor: Tensor) -> None:
        """Append `tensor`; its name must be new to the file."""
        assert name not in self._header, name
        raw = tensor.detach().cpu().contiguous()
        begin = self.nbytes
        self._data.write(raw_bytes(raw))
        self.nbytes += raw.numel() * raw.element_size()
        offsets = [begin, self.nbytes]
        self._header[name] = {"dtype": DTYPE_NAMES[raw.dtype], "shape": list(raw.shape), "data_offsets": offsets}

    def names(self) -> list[str]:
        return [name for name in self._header if name != "__metadata__"]

    def close(self) -> None:
        """Put header and data together at `path`, durable on disk."""
        self._data.close()
        header = json.dumps(self._header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with self.path.open("wb") as file, self._data_path.open("rb") as data:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            shutil.copyfileobj(data, file, 1 << 24)
            file.flush()
            os.fsync(file.fileno())
        self._data_path.unlink()
