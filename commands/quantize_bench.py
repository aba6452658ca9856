"""`quantize-bench`: decode speed in tokens per second, and as a share of memory bandwidth."""

import json
from itertools import product
from pathlib import Path

import click
import torch
from rich.table import Table

from lowbit import __version__, engine
from lowbit.api.recording import store
from lowbit.commands.common import REVISION, make_console, run_command, say, say_expanded
from lowbit.commands.parts import SETTINGS
from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.shapes import METHODS, SHAPES, random_weights
from lowbit.engine.speed import Speed, kernels_of_step, measure, read_rate
from lowbit.errors import EngineError
from lowbit.export.snapshot import refuse_to_write_into
from lowbit.models.devices import check_device

COLUMNS = ("method", "batch", "prompt", "tokens/s", "ms/token", "floor ms", "share of floor", "memory GiB")


def main() -> None:
    """Entry point of the console script."""
    run_command(bench)


@click.command(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="lowbit")
@click.argument("checkpoint", required=False)
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape, instead of a CHECKPOINT.")
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="Of --shape. [default: all]")
@click.option("--batch", type=int, multiple=True, default=(1, 2, 4, 8, 16), show_default=True, help="Sequences.")
@click.option("--prompt", type=int, multiple=True, default=(128, 2048), show_default=True, help="Prompt tokens.")
@click.option(
    "--new-tokens", "output", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate."
)
@click.option("--cache", type=click.Choice(["same", "int8"]), default="same", help="Type of keys and values.")
@click.option("--head", default="dense", help="Scheme to round the head to: int8.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type of activations.  [default: float16; float32 on a CPU]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@REVISION
@click.option("--profile", is_flag=True, help="Print the slowest kernels of a step (GPU only).")
@click.option("--record", is_flag=True, help="Also write the rows into CHECKPOINT, its card and its page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
def bench(
    checkpoint: str | None,
    shape: str | None,
    methods: tuple[str, ...],
    batch: tuple[int, ...],
    prompt: tuple[int, ...],
    output: int,
    cache: str,
    head: str,
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
    if (checkpoint is None) == (shape is None):
        raise click.UsageError("name a CHECKPOINT, or a --shape; not both")
    if record:
        refuse_to_write_into(Path(required(checkpoint, "--record")))
    place, context = torch.device(check_device(device)), max(prompt) + output
    dtype = dtype or ("float32" if place.type == "cpu" else "float16")
    kind = getattr(torch, dtype)
    read_gbs = read_rate(place)
    measured = []
    table = Table(*COLUMNS, title=f"{checkpoint or shape}, {dtype}, {read_gbs:.0f} GB/s read", box=None)
    try:
        for method in methods or (METHODS if shape else ("checkpoint",)):
            if shape is None:
                model = engine.load(str(checkpoint), str(place), kind, context, cache, head, revision)
            else:
                model = random_engine(shape, method, kind, place, Options(context, cache == "int8"), head)
            say_expanded(model.decoder.weights.expanded)
            say(f"{method}: decoding in {dtype} on {name_of(place)}", err=True)
            for rows, before in product(batch, prompt):
                speed = measure(model, rows, before, output, read_gbs)
                measured.append({"shape": checkpoint or shape, "method": method} | speed.as_row())
                if as_json:
                    click.echo(json.dumps(measured[-1]))
                table.add_row(method, *columns(speed))
            if profile and place.type == "cuda":
                show_profile(model, batch[-1])
    except EngineError as error:
        raise click.UsageError(str(error)) from error
    if record:
        about = {"evaluation": "speed", "device": name_of(place), "dtype": dtype}
        store(Path(str(checkpoint)), [row | about | {"shape": Path(str(checkpoint)).name} for row in measured])
    if not as_json:
        make_console().print(table)


def required(checkpoint: str | None, option: str) -> str:
    """The directory CHECKPOINT, for `option` to write into; a usage error without one."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise click.UsageError(f"{option} writes into a directory: name that as CHECKPOINT")
    return checkpoint


def name_of(device: torch.device) -> str:
    """The device's name in rows: the GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def random_engine(
    shape: str, method: str, dtype: torch.dtype, device: torch.device, options: Options, head: str
) -> Engine:
    """An engine with random weights."""
    architecture, like = SHAPES[shape], torch.empty(0, dtype=dtype, device=device)
    weights = random_weights(architecture, method, like, head, not options.int8_cache)
    return Engine(Decoder(architecture, weights, options.context), None, options)


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
