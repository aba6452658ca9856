"""`quantize MODEL --method awq --output DIR`: quantize a language model and write a checkpoint that engines load."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from lowbit.api import quantizing as api
from lowbit.api.drafting import STEPS, Tuned, require_tunable, tune_drafter
from lowbit.calibrate.settings import OWNERS
from lowbit.commands.common import run_command
from lowbit.commands.display import Display
from lowbit.commands.parts import by_part, frame
from lowbit.commands.quantize_console import Printer
from lowbit.commands.quantize_options import PARTS
from lowbit.export.dialects import format_of
from lowbit.export.staging import told_whole
from lowbit.models.files import model_directory
from lowbit.quant.recipe import Recipe


def main() -> None:
    """Entry point of the console script."""
    run_command(
        quantize,
        "Interrupted; nothing was written. Finished blocks of a method with calibration are kept: see --resume.",
    )


@click.command(
    **frame(
        "lowbit quantize demo --method awq --output demo-awq",
        "lowbit quantize org/model --method gptq --dataset texts.jsonl --output model-w4",
        "lowbit quantize model --scheme nvfp4 --output model-nvfp4 --push-to-hub me/model-nvfp4",
        "lowbit quantize model --method best --target-size 12GiB --output model-12 --dry-run",
    )
)
@click.argument("model_argument", metavar="[MODEL]", required=False)
@by_part(PARTS)
def quantize(
    model_argument: str | None, model: str | None, output: Path | None, recipe_file: Path | None, **flags: Any
) -> None:
    """Quantize MODEL and write a checkpoint for vLLM, SGLang, transformers or llama.cpp."""
    keys = {field.name for field in fields(Recipe)} | set(OWNERS)
    settings = {key: flags.pop(key) for key in keys & set(flags)}
    name, drafter = _model_name(model_argument, model), Tunable(flags.pop("drafter"), flags.pop("drafter_steps"))
    drafter.require(name, output, flags["revision"])  # better now than after hours of work
    display = Display(flags.pop("quiet"), flags.pop("as_json"))
    with Printer(display, flags.pop("verbose"), flags["dry_run"]) as printer:
        done = api.quantize(
            name,
            output,
            recipe=recipe_file,
            progress=printer,
            **flags,
            **_given(settings),
        )
        if done.output is not None:
            with told_whole(done.output):
                tuned = drafter.tune(done.output, flags, printer)
                printer.result(done)
                if tuned is not None:
                    printer.drafter(tuned)


@dataclass(frozen=True)
class Tunable:
    """The drafter that the options name, or None."""

    name: str | None
    steps: int | None

    def require(self, model: str, output: Path | None, revision: str | None) -> None:
        """A usage error for options that contradict each other, CheckpointError for a drafter of another model."""
        if self.name is None:
            if self.steps is not None:
                raise click.UsageError(f"--drafter-steps {self.steps} tunes a drafter: name one with --drafter")
            return
        if output is not None and format_of(output) is not None:
            raise click.UsageError(f"--drafter {self.name} is tuned with a directory; {output} is to be one file")
        require_tunable(model_directory(model, revision=revision), self.name)

    def tune(self, output: Path, flags: Mapping[str, Any], printer: Printer) -> Tuned | None:
        """The drafter after its tuning with the checkpoint in `output`; None without one."""
        if self.name is None:
            return None
        target, steps = output.with_name(f"{output.name}-drafter"), self.steps or STEPS
        how = {"device": flags["device"], "overwrite": flags["overwrite"], "progress": printer}
        return tune_drafter(output, self.name, target, steps=steps, **how)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """The options given by the user, with comma-separated names as tuples."""
    given = {key: value for key, value in settings.items() if value not in (None, ())}
    if "ignore" in given:
        given["ignore"] = _names(*given["ignore"])
    if "candidates" in given:
        given["candidates"] = _names(given["candidates"])
    if "transforms" in given:
        given["transforms"] = _names(given["transforms"].replace("none", ""))
    return given


def _names(*texts: str) -> tuple[str, ...]:
    """The comma-separated names in `texts`. Commas inside the brackets of a pattern do not separate."""
    parts = (part.strip() for text in texts for part in re.split(r",(?![^\[({]*[\])}])", text))
    return tuple(part for part in parts if part)


def _model_name(argument: str | None, option: str | None) -> str:
    if argument and option and argument != option:
        raise click.UsageError(f"two models named, {argument!r} and {option!r}; name one")
    name = argument or option
    if name is None:
        raise click.UsageError("name a model: a directory, a hub id, or demo")
    return name
