"""Plain English, as far as a short list of words can tell: docstrings and comments open with the thing they describe.

CONTRIBUTING.md has the whole style.
"""

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.house.test_text import lines, tracked
from tests.house.tree import ROOT

OPENERS = re.compile(r"(?:what|which|how|whether|where|whose|who|why|if)\b", re.IGNORECASE)
# Riddles: relative clauses without an antecedent, and people who do not exist.
PHRASES = re.compile(
    r"where nobody|that nobody|nobody's|beside it\b|the wiser|what came of|somebody else", re.IGNORECASE
)
C_SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}
DIARIES = ("CHANGELOG.md", "docs/history/")  # records of the past
QUOTING = ("tests/house/test_english.py:", "CONTRIBUTING.md:")  # the words themselves
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring and comment of a source; the lines of a comment are joined."""
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text:
                yield node.body[0].lineno, text
    yield from joined(comments_of(path))


def comments_of(path: Path) -> Iterator[tuple[int, bool, str]]:
    """(line, True if it stands alone on the line, text) of every comment."""
    if path.suffix == ".py":
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT:
                    yield token.start[0], token.line.lstrip().startswith("#"), token.string.lstrip("#: ")
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        before, mark, text = line.partition("//")
        if mark and not before.endswith(":"):  # an address
            yield number, not before.strip(), text.strip()


def joined(comments: Iterator[tuple[int, bool, str]]) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment, with comments that stand alone on adjacent lines as one."""
    begin, last, texts = 0, 0, list[str]()
    for line, alone, text in comments:
        if not (alone and line == last + 1):
            if texts:
                yield begin, " ".join(texts)
            begin, texts = line, []
        texts.append(text)
        last = line if alone else 0
    if texts:
        yield begin, " ".join(texts)


@cache
def prose() -> tuple[tuple[str, str], ...]:
    """(file:line, text) of every docstring and comment that git tracks."""
    sources = [path for path in tracked() if path.suffix in {".py", *C_SUFFIXES}]
    return tuple((f"{path.relative_to(ROOT)}:{line}", text) for path in sources for line, text in prose_of(path))


def test_docstrings_and_comments_open_with_the_thing() -> None:
    found = [f"{where}: {text[:70]}" for where, text in prose() if OPENERS.match(text)]
    assert not found, "say the thing first: 'The number of ...', 'True if ...', 'The reason why ...'\n" + "\n".join(
        found
    )


def test_no_riddles() -> None:
    pages = [path for path in tracked() if path.suffix == ".md" and not is_diary(path)]
    texts = [*prose(), *(line for path in pages for line in lines(path))]
    found = [f"{where}: {match[0]}" for where, text in texts if (match := PHRASES.search(text))]
    found = [each for each in found if not each.startswith(QUOTING)]
    assert not found, "write who or what is meant\n" + "\n".join(found)


def is_diary(path: Path) -> bool:
    return str(path.relative_to(ROOT)).startswith(DIARIES)


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ('"""What it is."""\n', ["What it is."]),
        ("# One\n# thought\nx = 1  # another\n# third\n", ["One thought", "another", "third"]),
    ],
)
def test_prose_is_found(source: str, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "source.py"
    path.write_text(source)
    assert [text for _, text in prose_of(path)] == texts
