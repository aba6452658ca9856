"""`quantize-report DIR`: write a page about a checkpoint, or about several side by side."""

from pathlib import Path

import click

from lowbit.api import reporting as api
from lowbit.commands.common import REVISION, make_console, run_command
from lowbit.commands.parts import FIRST, Parts, by_part, frame
from lowbit.export.plain import read_rows


def main() -> None:
    """Entry point of the console script."""
    run_command(report)


PARTS: Parts = {
    FIRST: (
        click.option(
            "--output",
            "-o",
            type=click.Path(path_type=Path),
            help="Write the result to this path, with .html, .md and .json at its end.  "
            "[default: CHECKPOINT/report; comparison, of several]",
        ),
        click.option(
            "--rows",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Read more measurements from this .jsonl file: rows of lowbit bench --json, with the device in "
            "`device`.  [default: none]",
        ),
        REVISION,
    ),
}


@click.command(**frame("lowbit report demo-awq", "lowbit report demo-awq demo-gptq --output both"))
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT [CHECKPOINT ...]")
@by_part(PARTS)
def report(checkpoints: tuple[str, ...], output: Path | None, rows: Path | None, revision: str | None) -> None:
    """Write a page about one checkpoint, or about several side by side, as HTML, Markdown and JSON."""
    console = make_console()
    for path in api.report(*checkpoints, output=output, rows=read_rows(rows) if rows else [], revision=revision):
        console.print(str(path))
