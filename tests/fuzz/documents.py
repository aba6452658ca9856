"""Strategies that spoil what honest files say: a value replaced, a key lost, a byte turned."""

import copy
from typing import Any

from hypothesis import strategies as st

DEEP: Any = "leaf"
for _ in range(40):
    DEEP = [DEEP]

# Values that readers meet in the place of others: of every type, at the edge of their range, and some that mislead.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10_000_000),
    *(0.0, -0.5, 1e-320, 1e308, float("inf"), float("nan")),
    *(
        "",
        "a",
        "x" * 300,
        "\x1b[31m\n\r",
        "../../etc/passwd",
        "/dev/zero",
        "org/model",
        "é\u2028",
        "{{ 7 * 7 }}",
        "9" * 30,
    ),
    *([], [0], [None], ["a", "b"], [[1, 2], [3]], {}, {"a": 1}, {"": {}}, DEEP),
)
LOST = object()


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, item in inner for way in ((*path, key), *paths_in(item, (*path, key)))]


def spoiled(document: Any) -> st.SearchStrategy[Any]:
    """`document` with one to three of its values replaced by odd ones or by each other, lost, or scaled."""
    paths = paths_in(document)
    values = st.one_of(
        st.sampled_from([*ODD, LOST]),
        st.sampled_from(paths).map(lambda path: _at(document, path)),
        st.integers(-3, 1 << 40),
    )
    edits = st.lists(st.tuples(st.sampled_from(paths), values), min_size=1, max_size=3)
    return edits.map(lambda edits: _edited(document, edits))


def turned(raw: bytes) -> st.SearchStrategy[bytes]:
    """`raw` with some bytes changed, taken out or put in."""
    edit = st.tuples(st.integers(0, len(raw)), st.integers(0, 8), st.binary(max_size=8))
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _cut(raw, edits))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _edited(document: Any, edits: list[tuple[tuple[Any, ...], Any]]) -> Any:
    result = copy.deepcopy(document)
    for path, value in edits:
        try:
            owner = _at(result, path[:-1])
            if value is LOST:
                del owner[path[-1]]
            else:
                owner[path[-1]] = copy.deepcopy(value)
        except (IndexError, KeyError, TypeError):  # an earlier edit took what this one wanted to change
            continue
    return result


def _cut(raw: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for start, count, new in edits:
        raw = raw[:start] + new + raw[start + count :]
    return raw
