"""`quantize-report DIR`: write a page about a checkpoint, or about several side by side."""

from pathlib import Path

import click

from lowbit import __version__
from lowbit.api import reporting as api
from lowbit.commands.common import REVISION, make_console, run_command
from lowbit.commands.parts import SETTINGS
from lowbit.export.plain import read_rows


def main() -> None:
    """Entry point of the console script."""
    run_command(report)


@click.command(context_settings=SETTINGS)
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT [CHECKPOINT ...]")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Path without suffix: .html, .md and .json are added.  [default: DIR/report; comparison, of several]",
)
@click.option(
    "--rows",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=".jsonl with more measurements: rows of quantize-bench --json, with the device in `device`.",
)
@REVISION
@click.version_option(__version__, prog_name="lowbit")
def report(checkpoints: tuple[str, ...], output: Path | None, rows: Path | None, revision: str | None) -> None:
    """Write a page about one checkpoint, or about several side by side, as HTML, Markdown and JSON."""
    console = make_console()
    for path in api.report(*checkpoints, output=output, rows=read_rows(rows) if rows else [], revision=revision):
        console.print(str(path))
