"""Options and output that the subcommands of `quantize-eval` share."""

import json
from collections.abc import Callable
from typing import Any

import click

from lowbit.api.session import DTYPES, Event, Scored
from lowbit.api.shared import Note
from lowbit.commands.common import REVISION
from lowbit.commands.display import OUTPUT_OPTIONS, Display
from lowbit.evaluation.backend import BACKENDS
from lowbit.evaluation.perplexity import Score
from lowbit.progress import Step


class Printer:
    """Prints notes and scores as they arrive; progress goes to the display, which ends with the command.

    options  of the command; --quiet and --json are removed from them
    """

    def __init__(self, options: dict[str, Any]) -> None:
        display = Display(options.pop("quiet"), options.pop("as_json"))
        self.display = click.get_current_context().with_resource(display)
        self.console = display.console

    def __call__(self, event: Event) -> None:
        match event:
            case Step():
                self.display(event)
            case Note(text):
                self.display.emit("note", vars(event))
                self.display.line(f"note: {text}")
            case Scored(score):
                self.display.emit("scored", score.as_json())
                self.display.line(_line(score))

    def last(self, row: dict[str, Any]) -> None:
        """Print `row` as JSON, the last line of the output."""
        self.display.stop()
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
        click.option(
            "--keep/--no-keep",
            "keep",
            default=True,
            show_default=True,
            help="Reuse finished windows of an earlier run.",
        ),
        click.option("--record", "store", is_flag=True, help="Also write the result into CHECKPOINT."),
        *OUTPUT_OPTIONS,
    )
    for option in reversed(options):
        command = option(command)
    return command
