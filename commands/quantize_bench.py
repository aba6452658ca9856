"""`quantize-bench`: decode speed in tokens per second, and as a share of memory bandwidth."""

import json
from itertools import product
from pathlib import Path

import click
import torch
from rich.table import Table

from lowbit import engine
from lowbit.api.recording import store
from lowbit.commands.common import CACHE, DENSE_HEAD, DEVICE, REVISION, make_console, run_command, say, say_loaded
from lowbit.commands.parts import FIRST, Parts, by_part, flag, frame, value
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
    ),
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
    ),
    "Results": (
        flag("--record", text="Store the result in CHECKPOINT, its card and its page."),
        flag("--profile", text="Print the slowest kernels of a step, on a GPU."),
        flag("--json", "as_json", text="Print JSON alone, one measurement a line."),
    ),
}


@click.command(
    **frame(
        "lowbit bench demo-awq --record",
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
    place, context = torch.device(check_device(device)), max(prompt_tokens) + new_tokens
    dtype = dtype or ("float32" if place.type == "cpu" else "float16")
    kind = getattr(torch, dtype)
    read_gbs = read_rate(place)
    measured = []
    table = Table(*COLUMNS, title=f"{checkpoint or shape}, {dtype}, {read_gbs:.0f} GB/s read", box=None)
    try:
        for method in weights or (METHODS if shape else ("checkpoint",)):
            if shape is None:
                model = engine.load(str(checkpoint), str(place), kind, context, cache, head, revision)
            else:
                model = random_engine(shape, method, kind, place, Options(context, cache == "int8"), head)
            say_loaded(model.decoder.weights.expanded, model.decoder.weights.cache)
            say(f"{method}: decoding in {dtype} on {name_of(place)}", err=True)
            for rows, before in product(batch, prompt_tokens):
                speed = measure(model, rows, before, new_tokens, read_gbs)
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
