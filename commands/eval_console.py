"""Options and output that the subcommands of `quantize-eval` share."""

import json
from typing import Any

import click

from lowbit.api.session import DTYPES, Event, Scored
from lowbit.api.shared import Note
from lowbit.commands.common import BASELINE, BASELINE_REVISION, DEVICE, REVISION, TRUST
from lowbit.commands.display import OUTPUT_OPTIONS, Display
from lowbit.commands.parts import Parts, flag, value
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


SETUP: Parts = {  # options of all subcommands: the keywords of lowbit.api.session.Setup
    "Models": (
        BASELINE,
        REVISION,
        BASELINE_REVISION,
        TRUST,
    ),
    "Computation": (
        value(
            "--backend",
            type=click.Choice(["auto", *BACKENDS]),
            default="auto",
            text="Compute with this backend; auto is transformers, or blocks (one block in memory at a time) if memory "
            "is short.",
        ),
        DEVICE,
        value(
            "--dtype",
            type=click.Choice(list(DTYPES)),
            default="float32",
            text="Use this floating-point type for all that is not quantized.",
        ),
        value("--keep/--no-keep", default=True, text="Reuse the finished work of an earlier run."),
    ),
    "Results": (
        flag("--record", "store", text="Store the result in CHECKPOINT, its card and its page."),
        *OUTPUT_OPTIONS,
    ),
}
