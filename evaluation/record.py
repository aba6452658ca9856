"""Measurements stored with a checkpoint: `evaluation.jsonl`, one row each."""

import json
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import refresh_sums
from lowbit.export.files import write_text
from lowbit.export.plain import read_rows
from lowbit.export.snapshot import refuse_to_write_into

FILE = "evaluation.jsonl"
# Keys that identify a measurement: a later row with equal values replaces the earlier one.
IDENTITY = (
    *("evaluation", "text", "text_sha256", "protocol", "context", "windows", "backend", "device", "dtype"),
    *("task", "metric", "fewshot", "problems_sha256", "batch", "prompt", "output"),
)


def merge_rows(earlier: list[dict[str, Any]], later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows in order; of two rows for the same measurement only the later one."""
    kept = {_identity(row): row for row in earlier}
    for row in later:
        kept.pop(_identity(row), None)
        kept[_identity(row)] = row
    return list(kept.values())


def record(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Add `rows` to the checkpoint in `directory`, and update its SHA256SUMS. Does nothing without rows."""
    if not rows:
        return
    refuse_to_write_into(directory)
    path = directory / FILE
    merged = merge_rows(read_rows(path), rows)
    replace_text(path, "".join(json.dumps(row) + "\n" for row in merged))
    refresh_sums(directory, [FILE])


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically. A link at `path` is replaced."""
    try:
        write_text(path, text)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; nothing was written") from error


def _identity(row: dict[str, Any]) -> str:
    return json.dumps({key: row.get(key) for key in IDENTITY}, sort_keys=True)
