"""Options and output that the subcommands of `quantize-eval` share."""

import json
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lowbit.api.session import DTYPES, Event, Scored, Step
from lowbit.api.shared import Note
from lowbit.commands.common import REVISION, Terminal, make_console
from lowbit.evaluation.backend import BACKENDS
from lowbit.evaluation.perplexity import Score


class Printer:
    """Prints notes and scores as they come. A terminal also gets a progress bar with the time left."""

    def __init__(self) -> None:
        self.console = make_console()
        shown = Terminal(file=sys.stderr)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=shown, transient=True, disable=not shown.is_terminal)
        self.task = self.bar.add_task("", total=None)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            self.bar.start()
            self.bar.update(self.task, description=event.title, completed=event.done, total=event.total)
            return
        self.bar.stop()
        if isinstance(event, Note):
            self.console.print(f"note: {event.text}")
        elif isinstance(event, Scored):
            self.console.print(_line(event.score))

    def last(self, row: dict[str, Any]) -> None:
        """Print `row` as JSON, the last line of the output."""
        self.bar.stop()
        click.echo(json.dumps(row))


def _line(score: Score) -> str:
    return (
        f"{score.model}: perplexity {score.perplexity:.4f} (loss {score.nll:.5f}) on {score.tokens} tokens, "
        f"{len(score.window_nll)} windows of {score.context}; {score.protocol}; {score.backend}"
    )


def setup_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options common to all subcommands: the keywords of lowbit.api.session.Setup."""
    options = (
        click.argument("checkpoint"),
        click.option("--baseline", help="Model measured in the same run: directory, hub id, or demo."),
        click.option(
            "--backend",
            type=click.Choice(["auto", *BACKENDS]),
            default="auto",
            show_default=True,
            help="Backend; auto is transformers, or blocks (one block in memory at a time) if memory is short.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
        click.option(
            "--dtype",
            type=click.Choice(list(DTYPES)),
            default="float32",
            show_default=True,
            help="Type to compute in.",
        ),
        REVISION,
        click.option("--baseline-revision", help="Branch, tag or commit of --baseline."),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's repository."),
        click.option("--cache/--no-cache", "keep", default=True, help="Reuse finished windows of an earlier run."),
        click.option("--record", "store", is_flag=True, help="Also write the result into CHECKPOINT."),
    )
    for option in reversed(options):
        command = option(command)
    return command
