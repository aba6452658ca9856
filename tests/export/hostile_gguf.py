"""Damaged and hostile GGUF files, one for each way in which a header can lie.

`python -m tests.export.hostile_gguf DIR` writes them, for other readers.
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

U32, TEXT, LIST, HUGE = 4, 8, 9, 1 << 63


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes | str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def head(tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def padded(raw: bytes, data: int = 0) -> bytes:
    return raw + b"\0" * (-len(raw) % 32) + bytes(data)


def with_keys(*keys: bytes) -> bytes:
    return padded(head(0, len(keys)) + b"".join(keys))


def with_tensors(*tensors: bytes, data: int = 4096, keys: tuple[bytes, ...] = ()) -> bytes:
    return padded(head(len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors), data)


def honest() -> bytes:
    """A file that is read: a key of each kind and two tensors."""
    keys = [
        key("general.architecture", TEXT, text("llama")),
        key("general.alignment", U32, struct.pack("<I", 32)),
        *(key(f"n.{kind}", kind, bytes(size)) for kind, size in ((0, 1), (1, 1), (2, 2), (3, 2), (5, 4), (6, 4))),
        *(key(f"n.{kind}", kind, bytes(size)) for kind, size in ((7, 1), (10, 8), (11, 8), (12, 8))),
        key("a.list", LIST, struct.pack("<IQ", U32, 3) + bytes(12)),
        key("a.texts", LIST, struct.pack("<IQ", TEXT, 2) + text("x") + text("")),
    ]
    return with_tensors(tensor("a", (8, 4)), tensor("b", (32, 2), 2, 128), data=192, keys=tuple(keys))


def _cut() -> Iterator[tuple[str, bytes]]:
    whole = honest()
    for size in (0, 3, 4, 7, 8, 15, 23, 24, 31, 60, 200, len(whole) - 100, len(whole) - 40):
        yield f"cut at {size}", whole[:size]


def _heads() -> Iterator[tuple[str, bytes]]:
    yield "another magic", head(magic=b"GGML")
    yield "big endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    for version in (0, 1, 4, 0xFFFFFFFF):
        yield f"version {version}", padded(head(version=version))
    for count in (1, 1 << 20, (1 << 20) + 1, HUGE, (1 << 64) - 1):
        yield f"{count} tensors", padded(head(tensors=count), 64)
        yield f"{count} keys", padded(head(keys=count), 8)


def _keys() -> Iterator[tuple[str, bytes]]:
    one = struct.pack("<I", 1)
    yield "a key twice", with_keys(key("a", U32, one), key("a", U32, one))
    for length in (1 << 13, 1 << 32, HUGE, (1 << 64) - 1):
        yield f"a name of {length} bytes", padded(head(0, 1) + struct.pack("<Q", length) + b"a" * 64)
        yield f"a text of {length} bytes", with_keys(key("a", TEXT, struct.pack("<Q", length) + b"a" * 64))
    for kind in (13, 255, 0xFFFFFFFF):
        yield f"a value of type {kind}", with_keys(key("a", kind, bytes(64)))
        yield f"a list of type {kind}", with_keys(key("a", LIST, struct.pack("<IQ", kind, 2) + bytes(64)))
    yield "lists of lists", with_keys(key("a", LIST, struct.pack("<IQ", LIST, 1 << 40) + bytes(64)))
    nested = struct.pack("<IQ", U32, 0)
    for _ in range(2000):
        nested = struct.pack("<IQ", LIST, 1) + nested
    yield "lists 2000 deep", with_keys(key("a", LIST, nested))
    for count in (1 << 33, HUGE, (1 << 64) - 1):
        yield f"a list of {count} numbers", with_keys(key("a", LIST, struct.pack("<IQ", U32, count)))
        yield f"a list of {count} texts", with_keys(key("a", LIST, struct.pack("<IQ", TEXT, count)))
    yield "a name that is no UTF-8", with_keys(key(b"\xff\xfe", U32, one))
    yield "a text that is no UTF-8", with_keys(key("a", TEXT, text(b"\xc3\x28")))
    yield "no name", with_keys(key("", U32, one))
    yield "a name with line ends", with_keys(key("a\nb", U32, one))
    for alignment in (0, 1, 3, 33, 1 << 31):
        yield f"alignment {alignment}", with_keys(key("general.alignment", U32, struct.pack("<I", alignment)))
    yield "an alignment that is text", with_keys(key("general.alignment", TEXT, text("32")))


def _tensors() -> Iterator[tuple[str, bytes]]:
    yield "a tensor twice", with_tensors(tensor("a", (8,)), tensor("a", (8,), 0, 32))
    yield "tensors that overlap", with_tensors(tensor("a", (16,)), tensor("b", (8,), 0, 32))
    yield "one tensor within another", with_tensors(tensor("a", (256,)), tensor("b", (8,), 0, 512))
    yield "an offset that is not aligned", with_tensors(tensor("a", (8,), 0, 4))
    for offset in (1 << 20, HUGE, (1 << 64) - 32):
        yield f"an offset of {offset}", with_tensors(tensor("a", (8,), 0, offset))
    yield "no dimensions", with_tensors(tensor("a", ()))
    yield "five dimensions", with_tensors(tensor("a", (2,) * 5))
    yield "a million dimensions", with_tensors(text("a") + struct.pack("<I", 1_000_000) + bytes(64))
    yield "2^32 - 1 dimensions", with_tensors(text("a") + struct.pack("<I", 0xFFFFFFFF) + bytes(64))
    for shape in ((1 << 40,), (1 << 63,), (1 << 32, 1 << 32), (1 << 20,) * 4, ((1 << 64) - 1, 2)):
        yield f"the shape {shape}", with_tensors(tensor("a", shape))
    for kind in (4, 5, 16, 31, 99, 0xFFFFFFFF):
        yield f"the block type {kind}", with_tensors(tensor("a", (256,), kind))
    yield "a row of no whole blocks", with_tensors(tensor("a", (33, 2), 2))
    yield "a row of no whole super-block", with_tensors(tensor("a", (288, 2), 12))
    yield "data that is missing", with_tensors(tensor("a", (1 << 12,)), data=64)
    yield "a tensor's name without end", with_tensors(struct.pack("<Q", HUGE) + b"a" * 64)
    yield "a tensor's name that is no UTF-8", with_tensors(tensor(b"\xff", (8,)))


def hostile() -> dict[str, bytes]:
    """The files by what is wrong with them."""
    return {name: raw for part in (_cut, _heads, _keys, _tensors) for name, raw in part()}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(hostile().values()):
        (place / f"{number:03d}.gguf").write_bytes(raw)
