"""export/plain.py: one JSON reader that accepts honest files and refuses all others, naming the file."""

import json

import pytest

from lowbit.errors import CheckpointError
from lowbit.export.plain import DEEPEST, parse_json, read_json, read_rows


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, 2.5, null, true, "é"]}',
        '{"limits": [0.0, Infinity, NaN]}',
        '{"a": 1, "a": 1}',
        "[]",
        '"\\ud83d\\ude00"',
    ],
)
def test_what_honest_files_say_is_read(text):
    assert str(parse_json(text.encode(), "x")) == str(json.loads(text))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[" * 100_000, "x: nested too deeply"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), f"x: nested more than {DEEPEST} deep"),
        (b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1), f"x: nested more than {DEEPEST} deep"),
        (b'{"a": 1, "a": 2}', "x: not JSON .*'a' stands in it twice"),
        (b'{"n": 1' + b"0" * 4000 + b"}", "x: a number of 13288 bits"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "x: not JSON"),
        (b'{"n": -18446744073709551616}', "x: a number of 65 bits"),
        (b'["\\ud800"]', "x: .* holds half a surrogate pair"),
        (b'{"\\udfff": 1}', "x: .* holds half a surrogate pair"),
        (b"\xff", r"x: not UTF-8 text \(byte 0\)"),
        (b"", "x: not JSON"),
        ("{}".encode("utf-16"), "x: not UTF-8"),
    ],
)
def test_what_would_break_a_reader_is_refused(raw, reason):
    with pytest.raises(CheckpointError, match=reason):
        parse_json(raw, "x")


def test_a_depth_that_is_just_allowed():
    assert parse_json(b"[" * DEEPEST + b"]" * DEEPEST, "x")


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"x"'])
def test_an_object_is_expected(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.json: a JSON object is expected"):
        read_json(tmp_path / "x.json")


def test_rows_are_named_by_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text('{"a": 1}\n\n{"b": 2}\n')
    assert read_rows(path) == [{"a": 1}, {"b": 2}]
    path.write_text('{"a": 1}\n' + "[" * 2000 + "]" * 2000)
    with pytest.raises(CheckpointError, match=r"rows\.jsonl:2: nested (too deeply|more than 64 deep)"):
        read_rows(path)
