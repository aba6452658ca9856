"""`quantize-report DIR`: what is known of a checkpoint, as a page to look at; of several, side by side."""

import json
from pathlib import Path
from typing import Any

import click

from lowbit import __version__
from lowbit.commands.common import SETTINGS, make_console, run_command
from lowbit.errors import UsageError
from lowbit.evaluation.record import replace_text
from lowbit.evaluation.report.compare import comparison
from lowbit.evaluation.report.facts import facts_of
from lowbit.evaluation.report.page import render, render_comparison
from lowbit.export.checkpoint import refresh_sums
from lowbit.export.plain import read_rows


def main() -> None:
    """Entry point of the console script."""
    run_command(report)


@click.command(context_settings=SETTINGS)
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR [DIR ...]")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Path without suffix: .html, .md and .json are added.  [default: DIR/report; comparison, of several]",
)
@click.option(
    "--rows",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=".jsonl of measurements kept elsewhere: what quantize-bench --json prints, with the device in `device`.",
)
@click.version_option(__version__, prog_name="lowbit")
def report(checkpoints: tuple[Path, ...], output: Path | None, rows: Path | None) -> None:
    """One page about a checkpoint, or several checkpoints side by side; also as Markdown and JSON."""
    if len({path.resolve() for path in checkpoints}) < len(checkpoints):
        raise UsageError("the same checkpoint is named twice")
    extra = read_rows(rows) if rows else []
    found = [facts_of(path, _rows_of(path, extra)) for path in checkpoints]
    if len(found) == 1:
        target = output or checkpoints[0] / "report"
        texts: dict[str, str] = {kind: render(found[0], kind) for kind in ("html", "md")}
        values: Any = found[0]
    else:
        target = output or Path("comparison")
        texts = {kind: render_comparison(found, kind) for kind in ("html", "md")}
        values = comparison(found) | {"checkpoints": found}
    texts["json"] = json.dumps(values, indent=1) + "\n"
    _write(target, texts)
    if target.parent.resolve() == checkpoints[0].resolve():
        refresh_sums(checkpoints[0], [f"{target.name}.{kind}" for kind in texts])
    console = make_console()
    for kind in texts:
        console.print(f"{target}.{kind}")


def _rows_of(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that belong to the checkpoint in `path`: `checkpoint`, or `shape` in rows of a benchmark, names it."""
    owned = [row for row in rows if Path(str(row.get("checkpoint", row.get("shape")))).name == path.resolve().name]
    return [{"evaluation": "speed"} | row if "tokens_per_s" in row else row for row in owned]


def _write(target: Path, texts: dict[str, str]) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such directory to write the report to")
    for kind, text in texts.items():
        replace_text(target.with_name(f"{target.name}.{kind}"), text)
