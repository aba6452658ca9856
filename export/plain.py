"""JSON from files that may be hostile: read in one place, within limits that no honest file reaches."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.files import read_bytes, write_text

DEEPEST = 64  # levels of lists and objects; configurations have 6
LARGEST = 1 << 64  # of a whole number: sizes, counts and offsets have 64 bits


def parse_json(raw: bytes, where: object) -> Any:
    """The JSON value in `raw`; `where` is its name in messages.

    Raises CheckpointError where it is no UTF-8 or no JSON, where a key stands twice with different values (one reader
    takes the first, another the last), where it is nested deeper than DEEPEST, where a whole number has more than 64
    bits, and where text holds half a surrogate pair.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON ({error})") from error
    _require_plain(value, where)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. CheckpointError where it is missing, no object, or as in `parse_json`."""
    try:
        value = parse_json(read_bytes(path), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model directory holds config.json and *.safetensors files") from None
    return require_object(value, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in `path`, one a line; none without a file. CheckpointError names a line that is none."""
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        return []
    return [row for _, row in rows_of(lines, path)]


def rows_of(lines: list[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) for each of the lines that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, require_object(parse_json(line, where), where)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_object(value: Any, where: object) -> dict[str, Any]:
    """`value`, which must be a JSON object."""
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


def _require_plain(value: Any, where: object) -> None:
    """Raise CheckpointError where a value that JSON can say is more than our readers take."""
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict | list):
            if depth > DEEPEST:
                raise CheckpointError(f"{where}: nested more than {DEEPEST} deep")
            waiting.extend((inner, depth + 1) for inner in item)
            if isinstance(item, dict):
                waiting.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, str):
            if not (item.isascii() or _is_text(item)):
                raise CheckpointError(f"{where}: {item[:40]!r} holds half a surrogate pair, which no file can say")
        elif isinstance(item, int) and not -LARGEST < item < LARGEST:
            raise CheckpointError(f"{where}: a number of {item.bit_length()} bits, where 64 at most are expected")


def _is_text(item: str) -> bool:
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
