"""export/tensorfile.py: the safetensors contract, read and written, and files that break it."""

import json
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError
from lowbit.export import tensorfile
from lowbit.export.tensorfile import DTYPES, Buffer, TensorFileWriter, read_entries, read_tensor

GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "I8", "shape": [2, 2], "data_offsets": [8, 12]},
}


def write(path: Path, header: Any, data: bytes = bytes(12), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | changes}


def test_a_file_by_hand(tmp_path):
    data = struct.pack("<2f4b", 1.5, -2, 1, 2, 3, -4)
    entries = read_entries(write(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}} | GOOD, data))
    assert set(entries) == {"a", "b"}
    assert read_tensor(entries["a"]).tolist() == [1.5, -2]
    assert read_tensor(entries["b"]).tolist() == [[1, 2], [3, -4]]
    assert entries["b"].numel == entries["b"].nbytes == 4


EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [12, 12]}
HOSTILE = {
    "overlap": (entry("b", data_offsets=[4, 8]), bytes(8)),
    "same bytes twice": (entry("b", dtype="F32", shape=[2], data_offsets=[0, 8]), bytes(8)),
    "gap": (entry("b", data_offsets=[9, 13]), bytes(13)),
    "begins after the start": ({"a": {"dtype": "I8", "shape": [4], "data_offsets": [8, 12]}}, bytes(12)),
    "beyond the end": (entry("b", data_offsets=[8, 1 << 40], shape=[1 << 40]), bytes(12)),
    "negative offset": (entry("a", data_offsets=[-8, 0]), bytes(12)),
    "end before begin": (entry("a", data_offsets=[8, 0]), bytes(12)),
    "wrong byte count": (entry("a", shape=[3]), bytes(12)),
    "negative dimension": (entry("b", shape=[-2, -2]), bytes(12)),
    "dimension is text": (entry("b", shape=["x"]), bytes(12)),
    "dimension is a fraction": (entry("b", shape=[2.5, 2]), bytes(12)),
    "dimension is null": (entry("b", shape=None), bytes(12)),
    "huge dimensions": (entry("b", shape=[1 << 62, 1 << 62]), bytes(12)),
    "a name of a million characters": (GOOD | {"c" * 1_000_000: EMPTY}, bytes(12)),
    "no elements in a huge shape": (GOOD | {"c": EMPTY | {"shape": [1 << 40, 0]}}, bytes(12)),
    "one offset": (entry("b", data_offsets=[8]), bytes(12)),
    "unknown dtype": (entry("b", dtype="F7"), bytes(12)),
    "dtype is a list": (entry("b", dtype=["F32"]), bytes(12)),
    "entry is a list": (GOOD | {"b": []}, bytes(12)),
    "entry is null": (GOOD | {"b": None}, bytes(12)),
    "trailing bytes": (GOOD, bytes(13)),
    "truncated data": (GOOD, bytes(11)),
    "no data": (GOOD, b""),
    "header is a list": ([GOOD], bytes(12)),
    "header is no JSON": (b"{not json", bytes(12)),
    "header is no UTF-8": (b'{"\xff\xfe": 1}', bytes(12)),
    "header is nested without end": (b"[" * 100_000, bytes(12)),
}


@pytest.mark.parametrize(("header", "data"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path, header, data):
    path = write(tmp_path / "evil.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"evil\.safetensors"):
        read_entries(path)


@pytest.mark.parametrize("length", [13, 1 << 20, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_not_allocated(tmp_path, length):
    path = write(tmp_path / "evil.safetensors", b"{}", b"", length)
    with pytest.raises(CheckpointError, match=f"header alone should take {length}"):
        read_entries(path)


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_first_number(tmp_path, size):
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"{size} bytes"):
        read_entries(path)


def test_every_truncation_of_a_real_file_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.ones(2, dtype=torch.int64)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_entries(path)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = write(tmp_path / "x.safetensors", GOOD)
    entries = read_entries(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="4 bytes of 'b' expected, 3 read"):
        read_tensor(entries["b"])


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_library_reads_ours_and_we_read_the_librarys(tmp_path, dtype):
    tensors = {"x": tensor_of(dtype), "empty": torch.empty(0, 3, dtype=dtype), "scalar": tensor_of(dtype)[0, 1]}
    save_file(tensors, tmp_path / "theirs.safetensors")
    writer = TensorFileWriter(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    for name, tensor in load_file(tmp_path / "ours.safetensors").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.float(), tensors[name].float())
    for name, found in read_entries(tmp_path / "theirs.safetensors").items():
        assert found.dtype == dtype
        assert torch.equal(read_tensor(found).float(), tensors[name].float())


def test_our_file_to_the_letter(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = TensorFileWriter(path)
    writer.add("t", torch.tensor([1, -2], dtype=torch.int32))
    writer.close()
    raw = path.read_bytes()
    header = b'{"__metadata__":{"format":"pt"},"t":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}'
    padded = header + b" " * (-len(header) % 8)
    assert raw == struct.pack("<Q", len(padded)) + padded + struct.pack("<2i", 1, -2)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    writer = TensorFileWriter(tmp_path / "x.safetensors")
    writer.add("turned", base.T)
    writer.add("sliced", base[:, 1:3])
    writer.close()
    read = load_file(tmp_path / "x.safetensors")
    assert torch.equal(read["turned"], base.T)
    assert torch.equal(read["sliced"], base[:, 1:3])


def test_what_is_read_stays_when_the_file_goes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.full((4,), 7.0)}, path)
    tensor = read_tensor(read_entries(path)["a"])
    path.write_bytes(b"")
    assert tensor.tolist() == [7.0] * 4
    tensor += 1


@pytest.mark.parametrize("room", [4096, 8])
def test_a_large_file_has_room_for_its_header_or_is_written_again(tmp_path, monkeypatch, room):
    monkeypatch.setattr(tensorfile, "HELD_BYTES", 100)
    monkeypatch.setattr(tensorfile, "HEADER_ROOM", room)
    tensors = {f"t{i}": torch.arange(7.0) + i for i in range(20)}
    writer = TensorFileWriter(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        writer.add(name, tensor.clone())
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    length = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert (length == 4096) == (room == 4096)
    assert length % 8 == 0
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_is_written_as_it_was_when_it_was_added(tmp_path):
    tensor = torch.zeros(4)
    writer = TensorFileWriter(tmp_path / "x.safetensors")
    writer.add("t", tensor)
    tensor += 1
    writer.close()
    assert load_file(tmp_path / "x.safetensors")["t"].tolist() == [0, 0, 0, 0]


def test_a_tensor_is_read_into_a_buffer_that_has_room(tmp_path):
    save_file({"a": torch.arange(6.0), "b": torch.ones(9)}, tmp_path / "model.safetensors")
    entries, buffer = read_entries(tmp_path / "model.safetensors"), Buffer(torch.zeros(24, dtype=torch.uint8))
    tensor = read_tensor(entries["a"], buffer)
    assert tensor.tolist() == list(range(6))
    assert tensor.data_ptr() == buffer.memory.data_ptr()
    assert read_tensor(entries["b"], buffer).tolist() == [1.0] * 9
    assert tensor.tolist() == list(range(6))


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_several_threads_read_what_one_does(count, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "SHARED_BYTES", 1)
    save_file({"a": torch.arange(count, dtype=torch.int32), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    entry, buffer = read_entries(tmp_path / "model.safetensors")["a"], Buffer(torch.zeros(4096, dtype=torch.uint8))
    for _ in range(3):
        assert torch.equal(read_tensor(entry, buffer), torch.arange(count, dtype=torch.int32))
    (tmp_path / "model.safetensors").write_bytes(b"")
    if count:
        with pytest.raises(CheckpointError, match=f"{4 * count} bytes of 'a' expected, 0 read"):
            read_tensor(entry, buffer)


def test_the_threads_that_read_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "SHARED_BYTES", 1)
    threads, read = set(), tensorfile.read_part
    monkeypatch.setattr(
        tensorfile, "read_part", lambda *given: (threads.add(threading.current_thread()), read(*given))[1]
    )
    save_file({name: torch.ones(100) for name in "abcdef"}, tmp_path / "model.safetensors")
    buffer = Buffer(torch.zeros(400, dtype=torch.uint8))
    for entry in read_entries(tmp_path / "model.safetensors").values():
        assert read_tensor(entry, buffer).sum() == 100
    assert 1 <= len(threads) <= tensorfile.READERS
    assert threading.current_thread() not in threads
