"""Reading and writing of safetensors files one tensor at a time, so that no whole file is in memory.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The
whole header is checked before any data is used (format: huggingface/safetensors, README "Format").
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, Unfinished
from lowbit.export.files import Identity, changed, create, identity_of, open_regular
from lowbit.export.plain import parse_json, require_object

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
LENGTH_BYTES = 8  # of a header's length
HELD_BYTES = 1 << 26
READERS, SHARED_BYTES = 4, 4 << 20  # threads of a Buffer, and the least bytes that they share: one copied 3 GB/s
HEADER_ROOM = 1 << 20  # bytes; some eight thousand tensors
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
MOST_DIMENSIONS = 16
MOST_ELEMENTS = 1 << 63  # most elements of a shape, not counting dimensions of 0: torch's limit
MOST_OF_NONE = 1 << 20  # largest dimension of a tensor without elements, for which no byte of the file stands
LONGEST_NAME = 1000  # characters; real names have a few dozen, and are matched with patterns


@dataclass(frozen=True)
class TensorEntry:
    """The location of a tensor: `nbytes` at byte `offset` of `path`, in a file with this identity.

    form  makes the tensor from the one in the file, where a container has it in another form
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    identity: Identity
    form: Callable[[Tensor], Tensor] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Buffer:
    """Memory that tensors are read into, one after another, and the threads that read large ones.

    The threads stay: to start four for each tensor took six times as long as to read it, on a machine with other work.

    memory  bytes (uint8)
    """

    memory: Tensor
    threads: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, READERS))


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, from its header.

    CheckpointError if the file is truncated, if the header is invalid, or if tensors overlap, leave gaps, or have a
    size that contradicts dtype and shape.
    """
    header, identity, start = _read_header(path)
    entries = [_entry(path, name, spec, start, identity) for name, spec in header.items() if name != "__metadata__"]
    position = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} starts at byte {entry.offset}, the one before it ends at {position}: "
                "overlapping or missing data; the file is damaged"
            )
        position += entry.nbytes
    if position != identity.size:
        raise CheckpointError(
            f"{path}: {identity.size} bytes on disk, {position} promised by its header: the file is truncated or "
            "damaged; download or copy it again"
        )
    return {entry.name: entry for entry in entries}


def _read_header(path: Path) -> tuple[dict[str, Any], Identity, int]:
    """The header, the file's identity, and the offset of the data."""
    with open_regular(path) as file:
        identity = identity_of(os.fstat(file.fileno()))
        size = identity.size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: {size} bytes, but its header alone should take {length}: not a safetensors file, or truncated"
            )
        raw = file.read(length)
    where = f"{path}: the header, so the file is damaged"
    return require_object(parse_json(raw, where), where), identity, 8 + length


def _entry(path: Path, name: str, spec: Any, start: int, identity: Identity) -> TensorEntry:
    if not name.isprintable() or len(name) > LONGEST_NAME:
        what = "which cannot be printed" if len(name) <= LONGEST_NAME else f"and so on for {len(name)} characters"
        raise CheckpointError(f"{path}: a tensor is called {name[:200]!r}, {what}: the file is damaged")
    try:
        dtype, shape, (begin, end) = DTYPES[spec["dtype"]], tuple(map(index, spec["shape"])), spec["data_offsets"]
        entry = TensorEntry(name, path, dtype, shape, start + index(begin), index(end) - index(begin), identity)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name!r} makes no sense ({str(spec)[:200]})") from error
    possible = len(shape) <= MOST_DIMENSIONS and min(shape, default=0) >= 0
    possible = possible and (0 not in shape or max(shape) <= MOST_OF_NONE)
    if not possible or math.prod(size for size in shape if size) >= MOST_ELEMENTS:
        raise CheckpointError(f"{path}: tensor {name!r} cannot be {str(list(shape))[:200]}: the file is damaged")
    if entry.nbytes != entry.numel * dtype.itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {spec['dtype']} {list(shape)} has {entry.nbytes} bytes, not "
            f"{entry.numel * dtype.itemsize}: the file is damaged"
        )
    return entry


def read_tensor(entry: TensorEntry, buffer: Buffer | None = None) -> Tensor:
    """The tensor of `entry`, copied into memory (nothing stays mapped).

    buffer  to read it into, if its bytes are enough: the tensor is valid until the next one is read into them

    Unfinished if the file changed since its header was read, or changes while it is read.
    """
    if buffer is None or len(buffer.memory) < entry.nbytes:
        raw, threads = torch.empty(entry.nbytes, dtype=torch.uint8), None
    else:
        raw, threads = buffer.memory[: entry.nbytes], buffer.threads
    with open_regular(entry.path) as file:
        got = read_by(threads, file.fileno(), entry.offset, raw_bytes(raw))
        identity = identity_of(os.fstat(file.fileno()))
    if got != entry.nbytes:
        raise CheckpointError(f"{entry.path}: {entry.nbytes} bytes of {entry.name!r} expected, {got} read")
    if identity != entry.identity:
        raise Unfinished(changed(entry.path))
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    tensor = raw.view(entry.dtype)
    return tensor.reshape(entry.shape) if entry.form is None else entry.form(tensor)


def read_by(threads: ThreadPoolExecutor | None, file: int, offset: int, into: memoryview) -> int:
    """The number of bytes read into memory from a file's `offset` on, by the threads if there are enough bytes."""
    if threads is None or len(into) < SHARED_BYTES:
        return read_part(file, offset, into)
    size = -(-len(into) // READERS)
    return sum(threads.map(lambda at: read_part(file, offset + at, into[at : at + size]), range(0, len(into), size)))


def read_part(file: int, offset: int, into: memoryview) -> int:
    """The number of bytes read into memory from a file's `offset` on: fewer than fit at the file's end."""
    got = 0
    while got < len(into):
        more = os.preadv(file, [into[got:]], offset + got)
        if not more:
            break
        got += more
    return got


def read_pieces(entry: TensorEntry, rows: int) -> Iterator[Tensor]:
    """The tensor of `entry`, so many rows (along its first dimension) at a time; errors as in `read_tensor`."""
    if entry.form is not None:
        yield from read_tensor(entry).split(rows)
        return
    row = entry.nbytes // max(entry.shape[0], 1) if entry.shape else entry.nbytes
    with open_regular(entry.path) as file:
        file.seek(entry.offset)
        for begun in range(0, entry.nbytes, max(rows * row, 1)):
            buffer = bytearray(min(rows * row, entry.nbytes - begun))
            if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
                raise CheckpointError(f"{entry.path}: ends within {entry.name!r}")
            piece = torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype)
            yield piece.reshape(-1, *entry.shape[1:]) if entry.shape else piece.reshape(())
        if identity_of(os.fstat(file.fileno())) != entry.identity:
            raise Unfinished(changed(entry.path))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


Spec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


def nbytes_of(spec: Spec) -> int:
    """Bytes of such a tensor."""
    dtype, shape = spec
    return dtype.itemsize * math.prod(shape)


class PlannedFile:
    """Writes one safetensors file whose tensors are known before: the header, then their bytes in the same order."""

    def __init__(self, path: Path, tensors: Mapping[str, Spec]) -> None:
        self.path, self._left = path, 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, spec in tensors.items():
            begin, self._left = self._left, self._left + nbytes_of(spec)
            header[name] = _header_entry(spec, begin)
        self._file, self._digest = create(path), hashlib.sha256()
        raw = _header_bytes(header)
        self._put(len(raw).to_bytes(LENGTH_BYTES, "little") + raw)

    def write(self, tensor: Tensor) -> None:
        """Append the bytes of a tensor on the CPU, or of some of its rows."""
        raw = raw_bytes(tensor.contiguous())
        self._left -= len(raw)
        self._put(raw)

    def _put(self, raw: bytes | memoryview) -> None:
        self._digest.update(raw)
        self._file.write(raw)

    def close(self) -> str:
        """Flush the file to the disk. Returns the SHA-256 of all that was written."""
        assert self._left == 0, f"{self.path}: {self._left} bytes missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file without its end."""
        self._file.close()


def _header_entry(spec: Spec, begin: int) -> dict[str, Any]:
    """A header's entry for a tensor whose bytes begin at `begin` of the data."""
    dtype, shape = spec
    return {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + nbytes_of(spec)]}


def _header_bytes(header: dict[str, Any]) -> bytes:
    """JSON of a header, padded with blanks to a multiple of 8 bytes."""
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


class TensorFileWriter:
    """Writes one safetensors file, tensor by tensor, and each byte once.

    The header comes first in the file and is known last. Tensors are held in memory up to HELD_BYTES, and a file that
    ends there has no room to spare. A larger file begins with HEADER_ROOM for its header, which is padded with blanks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._held: list[Tensor] = []
        self._begun = False
        self._file = create(path)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append `tensor` under a new name."""
        assert name not in self._header, name
        raw = tensor.detach().cpu().contiguous()
        self._header[name] = _header_entry((raw.dtype, tuple(raw.shape)), self.nbytes)
        self.nbytes += raw.nbytes
        if not self._begun and self.nbytes > HELD_BYTES:
            self._begin(HEADER_ROOM)
        if self._begun:
            self._file.write(raw_bytes(raw))
        else:
            self._held.append(raw.clone())

    def names(self) -> list[str]:
        return [name for name in self._header if name != "__metadata__"]

    def close(self) -> None:
        """Complete the file with its header, durably."""
        header = _header_bytes(self._header)
        if not self._begun:
            self._begin(len(header))
        if len(header) > self._room:
            self._make_room(len(header))
        self._file.seek(0)
        self._file.write(self._room.to_bytes(LENGTH_BYTES, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _begin(self, room: int) -> None:
        """Write what is held, behind `room` bytes for the header."""
        self._room, self._begun = room, True
        self._file.seek(LENGTH_BYTES + room)
        for raw in self._held:
            self._file.write(raw_bytes(raw))
        self._held.clear()

    def _make_room(self, room: int) -> None:
        """Write the file again, with more `room` for a header of very many tensors."""
        self._file.close()
        fuller = self.path.with_name(self.path.name + ".data")
        self.path.rename(fuller)
        self._file = create(self.path)
        self._file.seek(LENGTH_BYTES + room)
        with open_regular(fuller) as data:
            data.seek(LENGTH_BYTES + self._room)
            shutil.copyfileobj(data, self._file, 1 << 24)
        fuller.unlink()
        self._room = room
