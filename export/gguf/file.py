"""The container GGUF, byte for byte: a header of keys and tensors, then the tensors' data.

    "GGUF"  u32 version (3)  u64 tensors  u64 keys
    each key:     text name  u32 type  value
    each tensor:  text name  u32 dimensions  u64 each, the fastest first  u32 block type  u64 offset from the data
    padding to general.alignment (32), then the data, each tensor padded likewise

A text is its u64 length and UTF-8; a list is its u32 type, its u64 length and its values. Everything is little endian.
Every count and length is checked against the bytes that are left before anything of that size is read or made.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lowbit.errors import CheckpointError
from lowbit.export.blocks import BY_NUMBER
from lowbit.export.files import Identity, identity_of, open_regular

MAGIC, VERSION = b"GGUF", 3
VERSIONS = (2, 3)  # alike but for big-endian files, which are refused
ALIGNMENT = 32
TEXT, LIST = 8, 9  # types of values
# Numbers: type -> format of struct.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SIZES = {kind: struct.calcsize(f"<{code}") for kind, code in NUMBERS.items()}
U32, I32, F32, BOOL = 4, 5, 6, 7
MOST_DIMENSIONS = 4  # llama.cpp's limit
MOST_KEYS, MOST_TENSORS = 1 << 16, 1 << 20
MOST_HEADER = 1 << 28  # bytes; the largest vocabularies take 2^24
LONGEST_NAME = 1 << 12  # bytes
MOST_ELEMENTS = 1 << 62
PLAIN = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}  # types of one number: bytes; 0 F32, 1 F16, 30 BF16


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file.

    shape   slowest dimension first, as in torch
    kind    number of its block type
    offset  from the beginning of the file
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A file's keys, its tensors by name, and its identity."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, TensorInfo]
    identity: Identity


def bytes_of(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. ValueError for an unknown block type, or a row that it does not divide."""
    size, each = (1, PLAIN[kind]) if kind in PLAIN else (0, 0)
    if kind in BY_NUMBER:
        size, each = BY_NUMBER[kind].size, BY_NUMBER[kind].nbytes
    if not size:
        known = ", ".join(block.name for block in BY_NUMBER.values())
        raise ValueError(f"its block type {kind} is not read here; those that are: F32, F16, BF16, {known}")
    row = shape[-1] if shape else 1
    if row % size:
        raise ValueError(f"its rows of {row} do not divide into blocks of {size}")
    count = 1
    for dimension in shape:
        count *= dimension
    return count // size * each


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    CheckpointError, with the reason, for a truncated or contradictory one: counts and lengths beyond the file, names
    twice, unknown types, offsets that overlap or are not aligned, or dimensions whose product is impossible.
    """
    with open_regular(path) as file:
        identity = identity_of(os.fstat(file.fileno()))
        reader = _Reader(file, identity.size)
        try:
            keys, infos = _keys_and_tensors(reader)
            alignment = keys.get("general.alignment", ALIGNMENT)
            if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
                raise ValueError(f"general.alignment is {alignment!r:.40}; a power of two from 8 on fits")
            start = reader.place + -reader.place % alignment
            tensors = {name: _placed(name, *info, start, alignment, identity.size) for name, info in infos.items()}
            _require_apart(tensors.values())
        except (ValueError, struct.error) as error:
            raise CheckpointError(f"{path}: no GGUF that can be read: {error}") from error
    return Header(path, keys, tensors, identity)


class _Reader:
    """Reads the header of a file of `size` bytes, and not more than MOST_HEADER of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.place, self._end = file, 0, min(size, MOST_HEADER)
        self._size = size

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes. ValueError if the header ends before."""
        if count > self._end - self.place:
            limit = "the file ends" if self._end == self._size else "a header may end"
            raise ValueError(f"{what} takes {count} bytes at byte {self.place}, {limit} at byte {self._end}")
        raw = self._file.read(count)
        if len(raw) != count:
            raise ValueError(f"{what} ends at byte {self.place + len(raw)}: the file is truncated")
        self.place += count
        return raw

    def number(self, code: str, what: str) -> Any:
        """The next number, in struct's format `code`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, what: str, each: int, most: int | None = None) -> int:
        """The next count of things that take `each` bytes at least. ValueError if they do not fit the file."""
        found = int(self.number("Q", what))
        if found * each > self._end - self.place or (most is not None and found > most):
            limit = (
                f"{self._end - self.place} bytes are left"
                if most is None or found <= most
                else f"{most} at most are read"
            )
            raise ValueError(f"{found} {what}, and {limit}")
        return found

    def text(self, what: str, longest: int = MOST_HEADER) -> str:
        """The next text."""
        length = self.count(f"bytes of {what}", 1, longest)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8 (byte {error.start})") from error

    def value(self, what: str, kind: int | None = None) -> Any:
        """The next value; a list may hold no lists."""
        own = int(self.number("I", f"the type of {what}")) if kind is None else kind
        if own in NUMBERS:
            return self.number(NUMBERS[own], what)
        if own == TEXT:
            return self.text(what)
        if own != LIST or kind is not None:
            raise ValueError(f"{what} is of type {own}{'' if kind is None else ' within a list'}, which is not read")
        inner = int(self.number("I", f"the type of {what}"))
        if inner in NUMBERS:
            length = self.count(f"values of {what}", SIZES[inner])
            return list(struct.unpack(f"<{length}{NUMBERS[inner]}", self.take(length * SIZES[inner], what)))
        length = self.count(f"values of {what}", 8 if inner == TEXT else 1)
        return [self.value(what, inner) for _ in range(length)]


def _keys_and_tensors(reader: _Reader) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
    """The keys, and shape, block type and offset of each tensor."""
    magic = reader.take(4, "the magic")
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic!r}, not {MAGIC!r}")
    version = reader.number("I", "the version")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; 2 and 3, little endian, are read")
    tensors, count = reader.count("tensors", 24, MOST_TENSORS), reader.count("keys", 13, MOST_KEYS)
    keys: dict[str, Any] = {}
    for _ in range(count):
        name = _printable(reader.text("a key's name", LONGEST_NAME))
        if name in keys:
            raise ValueError(f"the key {name!r} is there twice")
        keys[name] = reader.value(f"the key {name!r}")
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = _printable(reader.text("a tensor's name", LONGEST_NAME))
        if name in infos:
            raise ValueError(f"the tensor {name!r} is there twice")
        dimensions = reader.number("I", f"the dimensions of {name!r}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} fit")
        shape = struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions, f"the shape of {name!r}"))[::-1]
        infos[name] = shape, reader.number("I", f"the type of {name!r}"), reader.number("Q", f"the offset of {name!r}")
    return keys, infos


def _printable(name: str) -> str:
    if not name or not name.isprintable():
        raise ValueError(f"the name {name[:80]!r} cannot be printed")
    return name


def _placed(
    name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int, size: int
) -> TensorInfo:
    """The tensor's place in the file. ValueError if its data cannot lie there."""
    count = 1
    for dimension in shape:
        count *= dimension
    if not 0 < count <= MOST_ELEMENTS:
        raise ValueError(f"the tensor {name!r} cannot have the shape {list(shape)}")
    try:
        nbytes = bytes_of(kind, shape)
    except ValueError as error:
        raise ValueError(f"the tensor {name!r}: {error}") from error
    if offset % alignment:
        raise ValueError(f"the tensor {name!r} begins at {offset} of the data, no multiple of {alignment}")
    if start + offset + nbytes > size:
        raise ValueError(
            f"the tensor {name!r} ends at byte {start + offset + nbytes} and the file at {size}: it is truncated"
        )
    return TensorInfo(name, shape, kind, start + offset, nbytes)


def _require_apart(tensors: Iterable[TensorInfo]) -> None:
    """ValueError if two tensors share bytes."""
    last: TensorInfo | None = None
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if last is not None and info.offset < last.offset + last.nbytes:
            raise ValueError(f"the tensors {last.name!r} and {info.name!r} overlap at byte {info.offset}")
        last = info


def header_bytes(keys: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> bytes:
    """The header of a file, up to its data, for tensors (shape, block type) in the order of their data."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    for name, value in keys.items():
        parts += [_text(name), *_value(value)]
    offset = 0
    for name, (shape, kind) in tensors.items():
        parts += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)]
        nbytes = bytes_of(kind, shape)
        offset += nbytes + -nbytes % ALIGNMENT
    raw = b"".join(parts)
    return raw + b"\0" * (-len(raw) % ALIGNMENT)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> list[bytes]:
    """A value's type and bytes: booleans, integers of 32 bits, float32, texts and lists of these."""
    if isinstance(value, list):
        kind = _kind(value[0]) if value else TEXT
        kind = I32 if kind == U32 else kind  # tokens' types, as llama.cpp reads them
        head = struct.pack("<IIQ", LIST, kind, len(value))
        if kind == TEXT:
            return [head, *map(_text, value)]
        return [head, struct.pack(f"<{len(value)}{NUMBERS[kind]}", *value)]
    kind = _kind(value)
    return [struct.pack("<I", kind), _text(value) if kind == TEXT else struct.pack(f"<{NUMBERS[kind]}", value)]


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return U32
    return F32 if isinstance(value, float) else TEXT
