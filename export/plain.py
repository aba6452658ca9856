"""Parsing of untrusted JSON, within limits that no honest file reaches."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.files import read_bytes, write_text

DEEPEST = 64  # levels of lists and objects; configurations have 6
LARGEST = 1 << 64  # limit of integers: sizes, counts and offsets have 64 bits


def parse_json(raw: bytes, where: object, largest: int = LARGEST) -> Any:
    """The JSON value in `raw`. `where` names it in messages. CheckpointError as `plain_json` raises ValueError."""
    try:
        return plain_json(raw, largest)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def plain_json(raw: bytes, largest: int = LARGEST) -> Any:
    """The JSON value in `raw`.

    ValueError for invalid UTF-8 or JSON, for a duplicate key with different values (readers disagree about which one
    counts), for nesting deeper than DEEPEST, for an integer of `largest` or more, and for half a surrogate pair.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    _require_plain(value, largest)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. CheckpointError if it is missing, not an object, or invalid (`parse_json`)."""
    try:
        value = parse_json(read_bytes(path), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model directory holds config.json and *.safetensors files") from None
    return require_object(value, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one per line; empty without a file. CheckpointError names an invalid line."""
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        return []
    return [row for _, row in rows_of(lines, path)]


def rows_of(lines: list[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) for each non-blank line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, require_object(parse_json(line, where), where)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_object(value: Any, where: object) -> dict[str, Any]:
    """`value` if it is a JSON object. CheckpointError otherwise."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"{key!r} stands in it twice")
    return found


def _require_plain(value: Any, largest: int) -> None:
    """Raise ValueError for a JSON value beyond the limits."""
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict | list):
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            waiting.extend((inner, depth + 1) for inner in item)
            if isinstance(item, dict):
                waiting.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, str):
            if not (item.isascii() or _is_text(item)):
                raise ValueError(f"{item[:40]!r} holds half a surrogate pair, which is not valid text")
        elif isinstance(item, int) and not -largest < item < largest:
            raise ValueError(f"a number of {item.bit_length()} bits, more than are expected")


def _is_text(item: str) -> bool:
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
