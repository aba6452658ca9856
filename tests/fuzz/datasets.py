"""Malformed tables of texts: every kind of file, rows of any shape, damaged bytes."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet

from lowbit.calibrate.data import calibration_tokens
from lowbit.calibrate.documents import ANSWERS, CONTEXTS, QUESTIONS, SYSTEMS, TEXT_COLUMNS, Reading, documents
from lowbit.calibrate.tables import TABLES, kind_of, local_rows, read_utf8
from lowbit.models.source import open_source
from tests.fuzz.documents import ODD, turned

Files = dict[str, bytes]
HONEST = "honest.jsonl"
KEYS = (*TEXT_COLUMNS, *QUESTIONS, *ANSWERS, *CONTEXTS, *SYSTEMS, "tools", "x", "", "role", "from", "value", "type")
WORDS = (
    "user",
    "assistant",
    "system",
    "human",
    "gpt",
    "text",
    "image",
    "some words of a text ",
    "\ud800",
    "\x00,\"\n'",
)
TEMPLATES = (
    "",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content + 'x' }}"
    "{% endfor %}{{ tools | tojson if tools }}",
    "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
)

values = st.recursive(
    st.sampled_from([*ODD, *WORDS]) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
turns = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(WORDS) | values for key in ("role", "from", "content", "value", "tool_calls")}
)
cells = values | st.lists(turns, max_size=4)
rows = st.lists(st.dictionaries(st.sampled_from(KEYS), cells, max_size=5) | values, max_size=8)
alike = st.lists(st.sampled_from(KEYS), unique=True, min_size=1, max_size=4).flatmap(
    lambda keys: st.lists(st.fixed_dictionaries({key: st.sampled_from(WORDS[:6]) | cells for key in keys}), max_size=8)
)


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _json(rows: list[Any]) -> bytes:
    return json.dumps({"data": rows} if len(rows) % 2 else rows).encode()


def _csv(rows: list[Any]) -> bytes:
    file = io.StringIO(newline="")
    written = csv.writer(file)
    for row in rows:
        cells = [*row, *row.values()] if isinstance(row, dict) else [row]
        with suppress(csv.Error):
            written.writerow(cells)
    return file.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)]), file)
    except (pyarrow.ArrowException, UnicodeError, TypeError, ValueError, OverflowError):
        parquet.write_table(
            pyarrow.table({"text": [str(row).encode("utf-8", "replace").decode() for row in rows]}), file
        )
    return file.getvalue()


def _text(rows: list[Any]) -> bytes:
    return "\n\n".join(map(str, rows)).encode("utf-8", "surrogatepass")


KINDS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
}


def files(honest: Path) -> st.SearchStrategy[Files]:
    """A data file of any kind, and a chat template."""

    def written(kind: str, packer: str) -> st.SearchStrategy[Files]:
        raw = (rows | alike).map(KINDS[kind])
        packed = (raw | raw.flatmap(turned)).map(PACKERS[packer])
        content = packed | packed.flatmap(turned) if packer else packed
        name = f"data{kind}{packer}"
        return st.tuples(content, st.sampled_from(TEMPLATES)).map(
            lambda made: {name: made[0], "chat_template.jinja": made[1].encode()}
        )

    return st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(list(PACKERS))).flatmap(lambda pair: written(*pair))


def honest(directory: Path) -> None:
    """Write a valid table, for cases without another one."""
    (directory / HONEST).write_bytes(_jsonl([{"messages": [{"role": "user", "content": "some words"}]}] * 9))


def table(place: Path) -> Path:
    """The file that was laid over the model's."""
    return next(place.glob("data.*"), place / HONEST)


def calibrate(place: Path) -> None:
    """The file as calibration tokens."""
    tokenizer = open_source(str(place)).tokenizer()
    assert calibration_tokens(str(table(place)), tokenizer, 2, 8, 0).ids.shape == (2, 8)


def read(place: Path) -> None:
    """The file as a text to score, its rows all accounted for."""
    path, reading = table(place), Reading("data")
    if kind_of(path.name) not in TABLES:
        read_utf8(path)
        return
    texts = list(documents(local_rows(path, None), open_source(str(place)).tokenizer(), reading))
    "".join(texts).encode()
    assert len(texts) + len(reading.skipped) == reading.rows
