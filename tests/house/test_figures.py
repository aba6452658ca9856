"""Figures in documents are those of the rows, or say where they are from."""

import re

import pytest

from benchmarks.tables import MARKED, TABLES, documents, fixed, rendered, unsaid

FIGURE = re.compile(
    r"\W*\d[\d.,]*( to [\d.]+)?( ?(us|ms|s|%|x|GiB|tokens/s))?( ± [\d.]+)?( \([^)]*\))?\W*"
)  # 16.49, 0.7 to 1.2 ms, +0.089 ± 0.006, 580 (67%)
ENOUGH = 3  # figures in the columns behind the first make a table one of figures
SOURCE = "From the log"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.stem)
def test_a_table_is_what_the_rows_give(path):
    text = path.read_text(encoding="utf-8")
    assert rendered(text) == text, "run `make tables`"
    assert text.count("<!-- table: ") == len(MARKED.findall(text)), "a mark without its end"


def test_every_table_stands_in_a_document():
    found = [name for path in documents() for _, name, _, _ in MARKED.findall(path.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(TABLES)


def test_sentences_have_the_figures_of_the_rows():
    assert unsaid() == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.stem)
def test_other_tables_of_figures_say_where_they_are_from(path):
    text = MARKED.sub("", path.read_text(encoding="utf-8"))
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            cells = [cell.strip() for line in block.splitlines()[2:] for cell in line.strip("|").split("|")[1:]]
            if sum(FIGURE.fullmatch(cell) is not None for cell in cells) >= ENOUGH:
                assert SOURCE in " ".join(section.split()), f"made from no rows, and no source: {block.splitlines()[0]}"


def test_halves_are_rounded_up():
    assert [fixed(0.0115, 3), fixed(209.477, 0), fixed(23.715, 2), fixed(0.5, 0)] == ["0.012", "209", "23.72", "1"]
