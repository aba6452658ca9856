"""Measurements beside the weights: `evaluation.jsonl` in a checkpoint, one row for each."""

import json
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import SUMS_NAME, sha256_of

FILE = "evaluation.jsonl"
# What tells two measurements apart: a later row with all of these equal takes the place of the earlier one.
IDENTITY = (
    *("evaluation", "text", "text_sha256", "protocol", "context", "windows", "backend", "device", "dtype"),
    *("task", "metric", "fewshot", "problems_sha256", "batch", "prompt", "output"),
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where there is no file. CheckpointError names a line that is no row."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise CheckpointError(f"{path}:{number}: a JSON object is expected, not {type(row).__name__}")
        rows.append(row)
    return rows


def merge_rows(earlier: list[dict[str, Any]], later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both, in order; of two rows that measure the same thing the later one."""
    kept = {_identity(row): row for row in earlier}
    for row in later:
        kept.pop(_identity(row), None)
        kept[_identity(row)] = row
    return list(kept.values())


def record(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Add `rows` to the checkpoint in `directory`, and correct its SHA256SUMS; nothing where there are none."""
    if not rows:
        return
    path = directory / FILE
    merged = merge_rows(read_rows(path), rows)
    replace_text(path, "".join(json.dumps(row) + "\n" for row in merged))
    refresh_sums(directory, [FILE])


def refresh_sums(directory: Path, names: list[str]) -> None:
    """Correct the lines of SHA256SUMS for the files `names`; nothing where the directory has no sums."""
    path = directory / SUMS_NAME
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.split("  ", 1)[-1] not in names]
    lines += [f"{sha256_of(directory / name)}  {name}" for name in names]
    replace_text(path, "".join(f"{line}\n" for line in sorted(lines, key=lambda line: line.split("  ", 1)[-1])))


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: {error.strerror}; nothing was written") from error


def _identity(row: dict[str, Any]) -> str:
    return json.dumps({key: row.get(key) for key in IDENTITY}, sort_keys=True)
