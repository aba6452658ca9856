"""export/gguf/file.py refuses every damaged or hostile header with its reason, in bounded time and memory."""

import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from lowbit.errors import CheckpointError
from lowbit.export.gguf.file import read_header
from tests.export.hostile_gguf import honest, hostile

FILES = hostile()


def test_there_are_enough_of_them(tmp_path: Path) -> None:
    assert len(FILES) >= 60
    (tmp_path / "model.gguf").write_bytes(honest())
    header = read_header(tmp_path / "model.gguf")
    assert header.keys["a.list"] == [0, 0, 0]
    assert header.keys["a.texts"] == ["x", ""]
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (4, 8), "b": (2, 32)}


@pytest.mark.parametrize("name", FILES)
def test_it_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(FILES[name])
    tracemalloc.start()
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"no GGUF that can be read: .{8}") as caught:
        read_header(path)
    assert time.perf_counter() - begun < 2
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(str(caught.value)) < 600


def test_a_count_that_fits_the_file_is_not_believed_twice(tmp_path: Path) -> None:
    """Each of 4 million empty texts takes 8 bytes of the file, so that a list of them is no larger than the file."""
    count = 1 << 16
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    raw += struct.pack("<IIQ", 9, 8, count) + struct.pack("<Q", 0) * count
    (tmp_path / "model.gguf").write_bytes(raw)
    assert len(read_header(tmp_path / "model.gguf").keys["a"]) == count
