"""calibrate/tables.py: the rows of every kind of file, whole or damaged, in any order."""

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from lowbit.calibrate import tables
from lowbit.calibrate.tables import BadRow, local_rows, read_utf8
from lowbit.errors import DatasetError
from lowbit.export.limits import limited

ROWS = [{"text": f"row {number}", "n": number} for number in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(path: Path, content: bytes | str, seed: int | None = None) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in local_rows(path, seed)]


def parquet(path: Path, group: int) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=group)
    return path


@pytest.mark.parametrize(
    "document",
    [
        json.dumps(ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"version": 1, "train": ROWS, "test": []}, indent=1),
        LINES,
    ],
)
def test_a_json_document_is_a_list_of_rows(tmp_path: Path, document: str) -> None:
    assert rows_of(tmp_path / "a.json", document) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL"])
def test_lines_are_rows(tmp_path: Path, name: str) -> None:
    assert rows_of(tmp_path / name, "\ufeff" + LINES.replace("\n", "\r\n\n")) == ROWS


def test_a_row_may_be_a_text_or_a_chat(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}]
    assert rows_of(tmp_path / "a.json", json.dumps(["a", chat])) == [{"text": "a"}, {"messages": chat}]
    assert rows_of(tmp_path / "b.json", json.dumps({"messages": chat})) == [{"messages": chat}]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)),
    ],
)
def test_files_may_be_compressed(tmp_path: Path, suffix: str, compress: Any) -> None:
    half = LINES.index('{"text": "row 25"')
    data = compress(LINES[:half].encode()) + compress(LINES[half:].encode())  # as `cat a.gz b.gz` makes one
    assert rows_of(tmp_path / f"a.jsonl{suffix}", data) == ROWS
    (tmp_path / f"a.txt{suffix}").write_bytes(data)
    assert read_utf8(tmp_path / f"a.txt{suffix}") == LINES
    for damaged in (data[:-9], b"plain text"):
        with pytest.raises(DatasetError, match=f"cannot read .*a.jsonl{suffix}: "):
            rows_of(tmp_path / f"a.jsonl{suffix}", damaged)


def test_parquet_is_read_a_group_at_a_time(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", group=7)
    assert [row for _, row in local_rows(path, None)] == ROWS
    shuffled = list(local_rows(path, 3))
    assert shuffled == list(local_rows(path, 3)) != list(local_rows(path, 4))
    assert sorted(shuffled, key=lambda pair: pair[0]) == list(enumerate(ROWS, 1))


def test_a_damaged_page_is_an_error_and_no_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", group=7)
    raw = bytearray(path.read_bytes())
    raw[4:40] = b"\xff" * 36
    path.write_bytes(raw)
    with pytest.raises(DatasetError, match=r"cannot read .*a\.parquet as parquet: "):
        list(local_rows(path, None))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_are_shuffled_as_datasets_does(tmp_path: Path, suffix: str) -> None:
    """A recipe's calibration hash of an earlier version stays true."""
    path = tmp_path / f"a{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    if suffix == ".parquet":
        parquet(path, group=100)
    elif suffix == ".csv":
        table.to_csv(path)
    else:
        path.write_text(LINES if suffix == ".jsonl" else json.dumps(ROWS))
    expected = table.shuffle(seed=11)["text"]
    assert [row["text"] for _, row in local_rows(path, 11)] == list(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('text,n\r\n"a, ""b""\nc",1\r\nd,2\r\n', [{"text": 'a, "b"\nc', "n": "1"}, {"text": "d", "n": "2"}]),
        ("\ufefftext\n\nä\n", [{"text": "ä"}]),
        ("text,n\na\n", [{"text": "a"}]),
        (f"text\n{'x' * 200_000}\n", [{"text": "x" * 200_000}]),
    ],
)
def test_csv(tmp_path: Path, content: str, expected: list[dict[str, str]]) -> None:
    assert rows_of(tmp_path / "a.csv", content) == expected


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', "row 2: not JSON .Expecting value"),
        ("a.jsonl", b'{"a": 1}\n5\n', "row 2: a JSON int, expected an object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "row 2: not UTF-8 text"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, "row 2: "),
        ("a.json", b'[{"a": 1}, null]', "row 2: a JSON NoneType, expected an object"),
        ("a.csv", b"a\n1\n2,3\n", "row 2: 2 fields, but 1 names in the first line"),
        ("a.csv", b"a\n1\n\xff\n", "row 2: .*can't decode"),
        ("a.csv", b'a\n1\n"b"c\n2\n', "row 2: ',' expected after"),
    ],
)
def test_a_bad_row_ends_nothing(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    rows = rows_of(tmp_path / name, content)
    assert [type(row) for row in rows[:2]] == [dict, BadRow]
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(f"row 2: {rows[1]}")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.json", b"no JSON", "cannot read .*a.json as json: "),
        ("a.json", b"[" * 100_000, "cannot read .*a.json as json: "),
        ("a.json", b'[{"a": 1}', "cannot read .*a.json as json: "),
        ("a.parquet", b"no parquet", "cannot read .*a.parquet as parquet: "),
        ("a.csv", b'a\n1\n"b\n2\n', "cannot read .*a.csv as csv: unexpected end of data"),
        ("a.csv", b"a\xff\n1\n", "cannot read .*a.csv as csv: .*can't decode"),
        ("a.csv", b"a,b,a\n1,2,3\n", "cannot read .*a.csv as csv: two columns are called 'a'; rename one"),
        (
            "a.csv",
            b"a;b\n1;2\n",
            "cannot read .*a.csv as csv: its columns are separated by ';'; only commas are supported",
        ),
        ("a.csv", b"\n\n", None),
        ("a.json", b" \n\t\n", None),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes, told: str | None) -> None:
    if told is None:
        assert rows_of(tmp_path / name, content) == []
        return
    with pytest.raises(DatasetError, match=told):
        rows_of(tmp_path / name, content)


def test_a_compressed_file_that_expands_beyond_measure_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_HELD", 1 << 16)
    with pytest.raises(DatasetError, match=r"a\.jsonl\.gz expands to more than 65536 bytes"):
        rows_of(tmp_path / "a.jsonl.gz", gzip.compress(b" " * (1 << 17)))


def test_a_text_that_every_row_repeats_is_in_memory_once(tmp_path: Path) -> None:
    """Kilobytes that say gigabytes: 600 rows of one text of 4 MB, which the file holds once."""
    path = tmp_path / "a.parquet"
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 600, pyarrow.int32()), ["x" * (1 << 22)])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    before = pyarrow.total_allocated_bytes()
    rows = local_rows(path, None)
    assert len(next(rows)[1]["text"]) == 1 << 22
    assert pyarrow.total_allocated_bytes() - before < 1 << 26


def test_a_row_group_that_expands_beyond_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"{i}" + "x" * (1 << 20) for i in range(8)]}), path, compression="zstd"
    )
    assert len(list(local_rows(path, None))) == 8
    monkeypatch.setattr("lowbit.calibrate.tables.MOST_HELD", 1 << 20)
    with pytest.raises(DatasetError, match=r"bytes of a row group expand to \d+"):
        list(local_rows(path, None))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.txt.gz")
    for path, kind in (
        ("/dev/zero", "a device"),
        (tmp_path / "pipe.jsonl", "a pipe"),
        (tmp_path / "pipe.txt.gz", "a pipe"),
    ):
        with pytest.raises(DatasetError, match=f"^{path}: {kind}, where a file is expected"):
            read_utf8(Path(path))
    with pytest.raises(DatasetError, match="a pipe, where a file is expected"):
        list(local_rows(tmp_path / "pipe.jsonl", None))


@pytest.mark.parametrize("name", ["story.txt", "story.txt.gz"])
def test_a_small_text_takes_little_memory(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "a tale of two cities\n" * 50
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    read_utf8(path)  # imports and maps what is used for the first time
    with limited("the text", 64 << 20, 10):
        assert read_utf8(path) == text


def test_what_would_fill_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_WHOLE", 1 << 20)
    texts = {
        "a.txt": b"x" * (1 << 20),
        "b.json": b'["' + b"x" * (1 << 20) + b'"]',
        "c.jsonl": b'{"a": 1}\n"' + b"x" * (1 << 20),
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    assert len(read_utf8(tmp_path / "a.txt")) == 1 << 20
    (tmp_path / "a.txt").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(DatasetError, match=r"a\.txt is larger than 1 MiB, the most read at once"):
        read_utf8(tmp_path / "a.txt")
    with pytest.raises(DatasetError, match=r"b\.json: the document is larger than 1 MiB"):
        list(local_rows(tmp_path / "b.json", None))
    with pytest.raises(DatasetError, match=r"c\.jsonl: line 2 is larger than 1 MiB"):
        list(local_rows(tmp_path / "c.jsonl", None))


def test_json_with_a_byte_order_mark(tmp_path):
    for name, content in (("a.json", '[{"text": "a"}]'), ("a.jsonl", '{"text": "a"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert [row for _, row in local_rows(tmp_path / name, None)] == [{"text": "a"}]


def test_a_row_deeper_or_larger_than_any_reader_takes_is_a_bad_row(tmp_path):
    rows = ['{"text": "a"}', '{"a": ' * 70 + "1" + "}" * 70, '{"a": 1' + "0" * 30 + "}", '{"a": 1, "a": 2}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = [row for _, row in local_rows(tmp_path / "a.jsonl", None)]
    assert found[0] == {"text": "a"}
    assert [str(row) for row in found[1:]] == [
        "nested more than 64 deep",
        "a number of 100 bits, more than are expected",
        "not JSON ('a' stands in it twice)",
    ]
