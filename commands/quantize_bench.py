"""`quantize-bench`: decode speed in tokens per second, and as a share of memory bandwidth."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from lowbit import engine
from lowbit.api.recording import store
from lowbit.calibrate.data import builtin_text
from lowbit.commands.common import (
    BASELINE,
    BASELINE_REVISION,
    CACHE,
    DENSE_HEAD,
    DEVICE,
    REVISION,
    run_command,
    say,
    say_loaded,
)
from lowbit.commands.display import Display
from lowbit.commands.drafters import DRAFTER, DRAFTER_SCHEME, drafter_of
from lowbit.commands.parts import FIRST, Parts, by_part, flag, frame, value
from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.kinds import Drafter
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.shapes import METHODS, SHAPES, random_weights
from lowbit.engine.speed import DraftSpeed, Speed, kernels_of_step, measure, measure_drafts, read_rate
from lowbit.errors import EngineError
from lowbit.export.snapshot import published_name, refuse_to_write_into
from lowbit.models.devices import check_device
from lowbit.progress import Part, Step

PROMPT, TEXTS = 256, 4  # tokens and number of the texts that drafts are measured on
COLUMNS = ("method", "batch", "prompt", "tokens/s", "ms/token", "floor ms", "share of floor", "memory GiB")


def main() -> None:
    """Entry point of the console script."""
    run_command(bench)


PARTS: Parts = {
    FIRST: (
        click.option(
            "--shape",
            type=click.Choice(list(SHAPES)),
            help="Measure random weights of this shape.  [default: the weights of CHECKPOINT]",
        ),
        click.option(
            "--weights",
            type=click.Choice(list(METHODS)),
            multiple=True,
            help="Store the random weights so; may be given again.  [default: each in turn]",
        ),
        value(
            "--batch",
            type=int,
            multiple=True,
            default=(1, 2, 4, 8, 16),
            text="Decode this many sequences at once; may be given again.",
        ),
        value(
            "--prompt-tokens",
            type=int,
            multiple=True,
            default=(128, 2048),
            text="Begin with this many tokens; may be given again.",
        ),
        value(
            "--new-tokens",
            type=click.IntRange(min=1),
            default=128,
            text="Decode this many tokens of each sequence.",
        ),
        BASELINE,
    ),
    "Drafts": (DRAFTER, DRAFTER_SCHEME),
    "Engine": (
        DEVICE,
        click.option(
            "--dtype",
            type=click.Choice(["float16", "bfloat16", "float32"]),
            help="Use this floating-point type for all that is not quantized.  [default: float16; float32 on a CPU]",
        ),
        CACHE,
        DENSE_HEAD,
        REVISION,
        BASELINE_REVISION,
    ),
    "Results": (
        flag("--record", text="Store the result in CHECKPOINT, its card and its page."),
        flag("--profile", text="Print the slowest kernels of a step, on a GPU."),
        flag("--json", "as_json", text="Print JSON alone, one measurement a line."),
    ),
}


@dataclass(frozen=True)
class Trial:
    """The conditions of a measurement, the same for each model.

    sizes     sequences at once and tokens before, a pair for each row
    length    tokens to decode of each sequence
    read_gbs  memory read bandwidth of the device, GB/s
    """

    device: torch.device
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    length: int
    cache: str
    head: str
    drafter: Drafter | None
    read_gbs: float
    display: Display

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return max(*(before for _, before in self.sizes), PROMPT if self.drafter else 1) + self.length

    def load(self, model: str, revision: str | None, drafter: Drafter | None = None) -> Engine:
        """The engine of a checkpoint."""
        self.display(Step(f"loading {model}", 0, None))
        kind = getattr(torch, self.dtype)
        return engine.load(model, str(self.device), kind, self.context, self.cache, self.head, revision, drafter)

    def random(self, shape: str, method: str) -> Engine:
        """An engine with random weights."""
        self.display(Step(f"making {method} weights", 0, None))
        options = Options(self.context)
        architecture, like = SHAPES[shape], torch.empty(0, dtype=getattr(torch, self.dtype), device=self.device)
        weights = random_weights(architecture, method, like, self.head, self.cache)
        return Engine(Decoder(architecture, weights, options.context), None, options)

    def speeds(self, name: str, model: Engine) -> Iterator[Speed]:
        """The speed at each size."""
        say_loaded(model.decoder.weights.expanded, model.decoder.weights.unused_cache)
        say(f"{name}: decoding in {self.dtype} on {name_of(self.device)}", err=True)
        for number, (rows, before) in enumerate(self.sizes):
            self.display(Step(f"measuring {name}", number, len(self.sizes)))
            self.display(Part(f"{rows} x {self.length} tokens after {before}"))
            yield measure(model, rows, before, self.length, self.read_gbs)

    def drafts(self, model: Engine) -> DraftSpeed:
        """The speed with the drafter, on documentation."""
        self.display(Step("measuring drafts", 0, None))
        tokens = model.encode(builtin_text("heldout")[: 8 * TEXTS * PROMPT])
        return measure_drafts(model, [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(TEXTS)], self.length)


@click.command(
    **frame(
        "lowbit bench demo-awq --baseline demo --record",
        "lowbit bench --shape llama2-7b --weights w4 --batch 1 --prompt-tokens 128",
    )
)
@click.argument("checkpoint", required=False)
@by_part(PARTS)
def bench(
    checkpoint: str | None,
    shape: str | None,
    weights: tuple[str, ...],
    batch: tuple[int, ...],
    prompt_tokens: tuple[int, ...],
    new_tokens: int,
    baseline: str | None,
    baseline_revision: str | None,
    cache: str,
    head: str,
    drafter: str | None,
    drafter_scheme: str,
    dtype: str | None,
    device: str,
    revision: str | None,
    profile: bool,
    record: bool,
    as_json: bool,
) -> None:
    """Measure the decode speed of CHECKPOINT, or of a named shape with random weights.

    The floor is the time to read all bytes of a decode step at the bandwidth that a torch reduction reaches here.
    """
    refuse(checkpoint, shape, baseline, record)
    if shape is not None and drafter is not None:
        raise click.UsageError(f"--drafter {drafter} is for a CHECKPOINT: a --shape has random weights")
    place, sizes = torch.device(check_device(device)), tuple(product(batch, prompt_tokens))
    dtype = dtype or ("float32" if place.type == "cpu" else "float16")
    read_gbs, named = read_rate(place), str(checkpoint or shape)
    table = Table(*COLUMNS, title=f"{named}, {dtype}, {read_gbs:.0f} GB/s read", box=None)
    measured: list[dict[str, Any]] = []
    with Display(quiet=as_json) as display:
        drafts = drafter_of(drafter, drafter_scheme)
        trial = Trial(place, dtype, sizes, new_tokens, cache, head, drafts, read_gbs, display)
        try:
            before = original_speeds(trial, baseline, baseline_revision, table)
            for method in weights or (METHODS if shape else ("checkpoint",)):
                model = trial.random(shape, method) if shape else trial.load(named, revision, drafts)
                for speed in trial.speeds(method, model):
                    row = {"shape": named, "method": method} | speed.as_row() | next(before)
                    measured.append(row)
                    table.add_row(method, *columns(speed))
                    if as_json:
                        click.echo(json.dumps(row))
                if drafts is not None:
                    show_drafts(trial.drafts(model), {"model": named, "drafter": drafts.name}, as_json)
                if profile and place.type == "cuda":
                    show_profile(model, batch[-1])
        except EngineError as error:
            raise click.UsageError(str(error)) from error
        display.stop()
        if record:
            about = {"evaluation": "speed", "device": name_of(place), "dtype": dtype, "shape": Path(named).name}
            store(Path(named), [row | about for row in measured])
        if not as_json:
            display.line(table)


def show_drafts(speed: DraftSpeed, about: dict[str, Any], as_json: bool) -> None:
    """Print the speed with a drafter, and the shares of right drafts by place."""
    if as_json:
        click.echo(json.dumps(about | speed.as_row()))
        return
    shares = ", ".join(f"{share:.0%}" for share in speed.right)
    say(
        f"with {about['drafter']}: {speed.tokens / speed.steps:.2f} tokens a step, {speed.ms:.3f} ms a token "
        f"({speed.plain_ms:.3f} without), {speed.draft_ms:.3f} ms of a step for drafts and {speed.check_ms:.3f} ms for "
        f"the check; right by place: {shares or 'none'}"
    )


def refuse(checkpoint: str | None, shape: str | None, baseline: str | None, record: bool) -> None:
    """A usage error for options that contradict each other, before a weight is read."""
    if (checkpoint is None) == (shape is None):
        raise click.UsageError("name a CHECKPOINT, or a --shape; not both")
    if record:
        refuse_to_write_into(Path(required(checkpoint, "--record")))
    if baseline is not None and shape is not None:
        raise click.UsageError("--baseline is for a CHECKPOINT; beside a --shape write --weights dense as well")


def original_speeds(
    trial: Trial, baseline: str | None, revision: str | None, table: Table
) -> Iterator[dict[str, dict[str, Any]]]:
    """The part of each row of the checkpoint that is of the original, measured now; nothing without a `baseline`.

    table  gets a line of each measurement
    """
    if baseline is None:
        return repeat({})
    kept = ("ms_per_token", "tokens_per_s", "memory_gib")
    found = []
    for speed in trial.speeds("original", trial.load(baseline, revision)):
        table.add_row("original", *columns(speed))
        row = speed.as_row()
        found.append({"baseline": {"model": published_name(baseline)} | {key: row[key] for key in kept}})
    return iter(found)


def required(checkpoint: str | None, option: str) -> str:
    """The directory CHECKPOINT, for `option` to write into; a usage error without one."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise click.UsageError(f"{option} writes into a directory: name that as CHECKPOINT")
    return checkpoint


def name_of(device: torch.device) -> str:
    """The device's name in rows: the GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def columns(speed: Speed) -> list[str]:
    """The cells of one table row."""
    return [
        str(speed.batch),
        str(speed.prompt),
        f"{speed.tokens_per_s:.1f}",
        f"{speed.ms_per_token:.3f}",
        f"{speed.floor_ms:.3f}",
        f"{speed.share_of_floor:.1%}",
        f"{speed.memory_gib:.2f}",
    ]


def show_profile(model: Engine, batch: int) -> None:
    """Print the slowest kernels of a step."""
    for name, calls, us in kernels_of_step(model, batch)[:12]:
        say(f"{us:9.1f} us  {calls:4d} x  {name[:100]}")
