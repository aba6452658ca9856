"""`lowbit.report`: the facts of a checkpoint as a page; of several, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.arguments import typed
from lowbit.errors import UsageError
from lowbit.evaluation.record import replace_text
from lowbit.evaluation.report.card import CARD, refresh_card
from lowbit.evaluation.report.compare import comparison
from lowbit.evaluation.report.facts import facts_of
from lowbit.evaluation.report.page import render, render_comparison
from lowbit.export.checkpoint import refresh_sums
from lowbit.export.snapshot import refuse_to_write_into
from lowbit.models.files import model_directory


@typed()
def report(
    *checkpoints: str | Path,
    output: str | Path | None = None,
    rows: Sequence[dict[str, Any]] = (),
    revision: str | None = None,
) -> tuple[Path, ...]:
    """Write a report about a checkpoint, or about several side by side; the files written: .html, .md and .json.

    >>> import lowbit
    >>> done = lowbit.quantize("my-model", "my-model-int8", method="int8", eval_windows=1)
    >>> [path.name for path in lowbit.report("my-model-int8")]
    ['report.html', 'report.md', 'report.json']

    output    path without a suffix; default: DIR/report of a single checkpoint, or `comparison`
    rows      measurements kept elsewhere, as `quantize-bench --json` prints them
    revision  branch, tag or commit of a hub id

    Raises UsageError for bad arguments, CheckpointError for a damaged checkpoint.
    """
    if not checkpoints:
        raise UsageError("name a checkpoint")
    if revision is not None and len(checkpoints) > 1:
        raise UsageError(f"--revision {revision} applies to one checkpoint, but {len(checkpoints)} are given")
    paths = [model_directory(str(checkpoint), revision=revision) for checkpoint in checkpoints]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("the same checkpoint is named twice")
    found = [facts_of(path, _rows_of(path, rows)) for path in paths]
    if len(found) == 1:
        target = Path(output) if output else paths[0] / "report"
        texts = {kind: render(found[0], kind) for kind in ("html", "md")}
        values: Any = found[0]
    else:
        target = Path(output or "comparison")
        texts = {kind: render_comparison(found, kind) for kind in ("html", "md")}
        values = comparison(found) | {"checkpoints": found}
    texts["json"] = json.dumps(values, indent=1) + "\n"
    written = _write(target, texts)
    if target.parent.resolve() == paths[0].resolve():
        refresh_card(paths[0], found[0])
        refresh_sums(paths[0], [CARD, *(path.name for path in written)])
    return written


def _rows_of(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that belong to the checkpoint in `path`: `checkpoint`, or `shape` in rows of a benchmark, names it."""
    owned = [row for row in rows if Path(str(row.get("checkpoint", row.get("shape")))).name == path.resolve().name]
    return [{"evaluation": "speed"} | row if "tokens_per_s" in row else row for row in owned]


def _write(target: Path, texts: dict[str, str]) -> tuple[Path, ...]:
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such directory to write the report to")
    refuse_to_write_into(target.parent)
    for kind, text in texts.items():
        replace_text(target.with_name(f"{target.name}.{kind}"), text)
    return tuple(target.with_name(f"{target.name}.{kind}") for kind in texts)
