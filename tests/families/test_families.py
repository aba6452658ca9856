"""The table of families: it says what its rows say, enough of them work, and a few are tried again here."""

import json

import pytest

from tests.families.table import COLUMNS, METHODS, PAGE, ROWS, TOLD, WORKS, page_of, row_of, share, works

KINDS = ("llama", "gpt2", "gemma3_text", "mamba2", "qwen3_moe", "gpt_oss", "llama4_text", "llava", "qwen3_5")


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    return json.loads(ROWS.read_text())


def test_the_page_says_what_the_rows_say(rows):
    assert PAGE.read_text(encoding="utf-8") == page_of(rows)


def test_nearly_all_families_work(rows):
    tried = {kind: row for kind, row in rows.items() if "none" not in row}
    assert len(tried) > 200
    assert share("int8", tried) >= 0.95
    for column in ("blocks", *METHODS):
        assert share(column, tried) >= 0.9, column


def test_no_cell_is_a_traceback(rows):
    cells = [cell for row in rows.values() for cell in row.values()]
    assert all("\n" not in cell and "Traceback" not in cell and len(cell) < 100 for cell in cells)
    assert all(set(row) == set(COLUMNS) for row in rows.values() if "none" not in row)


def test_what_does_not_load_in_transformers_is_told_before_the_work(rows):
    """But for rwkv, whose class rescales its weights as it runs: without weights there is no trying it."""
    cells = {kind: row["transformers"] for kind, row in rows.items() if works(row, "int8")}
    assert {kind for kind, cell in cells.items() if not cell.startswith((WORKS, TOLD))} == {"rwkv"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_still_works(rows, tmp_path, kind):
    found = row_of(kind, tmp_path)
    assert all(found[column] == WORKS for column in ("blocks", *METHODS))
    assert {c: found[c] for c in ("transformers", "engine")} == {c: rows[kind][c] for c in ("transformers", "engine")}
