"""`quantize MODEL --method awq --output DIR`: a language model in, a checkpoint that engines load out."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lowbit import __version__
from lowbit.api import quantizing as api
from lowbit.calibrate.methods import METHODS
from lowbit.calibrate.rounding import ROUNDERS
from lowbit.calibrate.settings import OWNERS, type_of
from lowbit.calibrate.transforms import TRANSFORMS
from lowbit.commands.common import SETTINGS, Size, make_console, run_command, say
from lowbit.commands.quantize_console import Printer
from lowbit.evaluation.after import MEASURES, parse_measures
from lowbit.export.formats import FORMATS
from lowbit.export.staging import told_whole
from lowbit.quant.scheme import SHORT

RECIPE_FLAGS = [
    "method",
    "transforms",
    "rounder",
    "clip",
    "bits",
    "group_size",
    "symmetric",
    "activations",
    "scheme",
    "target_bits",
    "distill_steps",
    "ignore",
    "dataset",
    "num_samples",
    "seqlen",
    "text_column",
    "format",
    "dtype",
    "seed",
    "max_shard_size",
    *OWNERS,
]


def main() -> None:
    """Entry point of the console script."""
    run_command(quantize, "Interrupted; nothing was written. Blocks that were finished are kept: see --resume.")


def _list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        for method in METHODS.values():
            say(f"{method.name:8} {method.summary}")
        context.exit()


def _part_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for every setting of a part."""
    for name, part in reversed(OWNERS.items()):
        about = part.settings()[name].metadata
        text = f"{about['text'][0].upper()}{about['text'][1:]}."
        flags = (f"--{name.replace('_', '-')}", *about["flags"])
        command = click.option(*flags, name, type=type_of(part, name), help=text)(command)
    return command


@click.command(context_settings=SETTINGS)
@click.argument("model_argument", metavar="[MODEL]", required=False)
@click.option("--model", "-m", "--model-path", help="Directory, hub id, or demo. Also the first argument.")
@click.option("--method", help=f"One of {', '.join(METHODS)}.  [default: awq]")
@click.option("--output", "-o", "--output-dir", type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--bits", "--w-bit", "--wbits", type=int, help="Bits per weight: 4 or 8.")
@click.option(
    "--group-size", "--q-group-size", "--groupsize", type=int, help="Weights that share a scale; -1 per channel."
)
@click.option("--sym/--asym", "symmetric", default=None, help="Symmetric codes, or integer zero points.")
@click.option("--transforms", help=f"Before rounding, in order, with commas: {', '.join(TRANSFORMS)}; none for none.")
@click.option("--rounder", help=f"One of {', '.join(ROUNDERS)}.")
@click.option("--clip/--no-clip", default=None, help="Search each group's range on the output error.")
@click.option("--activations", help="Inputs of linears: none (16 bits), token (int8 per token), tensor (int8, static).")
@click.option("--scheme", help=f"All four at once: {', '.join(SHORT)}, int4-g64, int8-channel-a8token, fp8-channel ...")
@_part_options
@click.option("--distill-steps", type=int, help="Steps of tuning scales and norms on the whole model's output.")
@click.option("--target-bits", type=float, help="Average bits per linear weight, spent where they help most.")
@click.option(
    "--dataset", help="Calibration text: builtin, a file, or a hub id; NAME:CONFIG:SPLIT:N, several with commas."
)
@click.option(
    "--num-samples", "--nsamples", "--num-calibration-samples", "--calib-size", type=int, help="Calibration windows."
)
@click.option("--seqlen", "--max-seq-length", "--calib-seq", type=int, help="Tokens in a calibration window.")
@click.option("--text-column", help="Column of the dataset that holds the text.")
@click.option(
    "--ignore", "--ignore-layers", multiple=True, help="Linears to leave: names, last parts of names, re:PATTERN."
)
@click.option(
    "--recipe", "--config", "recipe_file", type=click.Path(path_type=Path), help="TOML file; flags override it."
)
@click.option("--format", "format", help=f"One of {', '.join(FORMATS)}.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--dtype", help="Of scales and unquantized weights: auto, bfloat16, float16, float32.")
@click.option("--seed", type=int, help="Of everything random.  [default: 42]")
@click.option("--max-shard-size", type=Size(), help="Of a weight file.  [default: 5GB]")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--eval-windows",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Windows of held-out builtin text to score before and after; 0 for none.",
)
@click.option(
    "--eval",
    "measures",
    default="ppl",
    show_default=True,
    callback=lambda context, option, value: parse_measures(value),
    help=f"What to measure then: {', '.join(MEASURES)}. A report is written too.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop before reading a weight.")
@click.option("--verbose", "-v", is_flag=True, help="Name every row of a dataset that is skipped.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run to the same output stopped.")
@click.option("--overwrite", is_flag=True, help="Replace an output directory that is not empty.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@click.option(
    "--list-methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods, help="Say what there is."
)
@click.version_option(__version__, prog_name="lowbit")
def quantize(
    model_argument: str | None, model: str | None, output: Path | None, recipe_file: Path | None, **flags: Any
) -> None:
    """Quantize MODEL and write a checkpoint that vLLM, SGLang and transformers load."""
    settings = {key: flags.pop(key) for key in RECIPE_FLAGS}
    with Printer(make_console(), flags.pop("verbose")) as printer:
        done = api.quantize(
            _model_name(model_argument, model),
            output,
            recipe=recipe_file,
            progress=printer,
            **flags,
            **_given(settings),
        )
        if done.output is not None:
            with told_whole(done.output):
                printer.result(done)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, with lists in place of commas."""
    given = {key: value for key, value in settings.items() if value not in (None, ())}
    if "ignore" in given:
        given["ignore"] = _names(*given["ignore"])
    if "transforms" in given:
        given["transforms"] = _names(given["transforms"].replace("none", ""))
    return given


def _names(*texts: str) -> tuple[str, ...]:
    """The names in texts that separate them by commas; one inside the brackets of a pattern separates nothing."""
    parts = (part.strip() for text in texts for part in re.split(r",(?![^\[({]*[\])}])", text))
    return tuple(part for part in parts if part)


def _model_name(argument: str | None, option: str | None) -> str:
    if argument and option and argument != option:
        raise click.UsageError(f"two models named, {argument!r} and {option!r}; name one")
    name = argument or option
    if name is None:
        raise click.UsageError("name a model: a directory, a hub id, or demo")
    return name
