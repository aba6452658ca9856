"""The options of `quantize`, grouped by part for its help: common ones first."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from lowbit import __version__
from lowbit.calibrate.methods import METHODS
from lowbit.calibrate.mixtures import MIXTURES
from lowbit.calibrate.rounding import ROUNDERS
from lowbit.calibrate.settings import OWNERS, type_of
from lowbit.calibrate.transforms import TRANSFORMS
from lowbit.commands.common import REVISION, Size, say
from lowbit.commands.display import OUTPUT_OPTIONS
from lowbit.evaluation.after import MEASURES, parse_measures
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.steps import STEPS
from lowbit.quant.scheme import NAMED

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
PATH = click.Path(path_type=Path)


def _list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        width = max(map(len, METHODS))
        for method in METHODS.values():
            say(f"{method.name:<{width}}  {method.summary}")
            say(f"{'':<{width}}  cost: {method.cost}")
            say(f"{'':<{width}}  use:  {method.use}")
        context.exit()


def _settings_of_parts() -> Iterator[Decorator]:
    """One option per setting of a transform or rounder."""
    for name, part in OWNERS.items():
        about = part.settings()[name].metadata
        text = f"{about['text'][0].upper()}{about['text'][1:]}."
        yield click.option(f"--{name.replace('_', '-')}", *about["flags"], name, type=type_of(part, name), help=text)


def _flag(name: str, text: str, **more: Any) -> Decorator:
    return click.option(name, is_flag=True, help=text, **more)


PARTS: dict[str, tuple[Decorator, ...]] = {
    "Options that people set first": (
        click.option("--model", "-m", "--model-path", help="Directory, hub id, or demo. Also the first argument."),
        click.option("--method", help=f"One of {', '.join(METHODS)}.  [default: awq]"),
        click.option("--output", "-o", "--output-dir", type=PATH, help="Directory to write."),
        click.option(
            "--scheme",
            help=f"Numbers by name: {', '.join(NAMED)}, int4-g128, uint4-g64 ...; or a mixture: {', '.join(MIXTURES)}.",
        ),
        click.option(
            "--dataset", help="Calibration text: builtin, a file, NAME:CONFIG:SPLIT:N of a hub; several with commas."
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
        click.option("--recipe", "--config", "recipe_file", type=PATH, help="TOML file; flags override it."),
        _flag("--dry-run", "Print the plan, and stop before reading any weight."),
    ),
    "Numbers": (
        click.option("--bits", "--w-bit", "--wbits", type=int, help="Bits of integer weights: 2 to 8."),
        click.option(
            "--group-size",
            "--q-group-size",
            "--groupsize",
            type=int,
            help="Weights that share a scale; -1 for a whole channel.",
        ),
        click.option("--sym/--asym", "symmetric", default=None, help="Symmetric codes, or integer zero points."),
        click.option("--activations", help="Inputs of linears: none (16 bits), token or tensor (int8, static)."),
        click.option("--head", help="Scheme of the output head: int8, fp8, int4-g64, ...  [default: 16 bits]"),
        click.option("--embeddings", help="Scheme of the input embeddings: int8, int4-g64, ...  [default: 16 bits]"),
        click.option(
            "--target-bits",
            type=float,
            help="Budget of bits per linear weight: schemes are chosen for the least loss within it.",
        ),
        click.option("--target-size", type=Size(), help="The same for the bytes of all weights: 12GiB, 500MB."),
        click.option("--target-ms", type=float, help="The same for milliseconds a token of lowbit's engine, batch 1."),
        click.option("--target-gpu", help=f"The GPU of --target-ms: {', '.join(STEPS)}.  [default: H200]"),
        click.option("--candidates", help="Schemes for a budget, with commas; 16bit too.  [default: by --scheme]"),
        click.option(
            "--ignore",
            "--ignore-layers",
            multiple=True,
            help="Linears to leave in 16 bits: names, parts of names, re:PATTERN.",
        ),
    ),
    "Parts of a method": (
        click.option("--transforms", help=f"Before rounding, in order: {', '.join(TRANSFORMS)}; none for none."),
        click.option("--rounder", help=f"One of {', '.join(ROUNDERS)}."),
        click.option(
            "--clip/--no-clip", default=None, help="Search each group's clipping range for the least output error."
        ),
        *_settings_of_parts(),
        click.option(
            "--distill-steps", type=int, help="Steps of tuning scales and norms on the model's output logits."
        ),
        click.option("--seed", type=int, help="Seed of all random choices.  [default: 42]"),
    ),
    "Calibration": (
        click.option(
            "--num-samples",
            "--nsamples",
            "--num-calibration-samples",
            "--calib-size",
            type=int,
            help="Number of calibration windows.",
        ),
        click.option("--seqlen", "--max-seq-length", "--calib-seq", type=int, help="Tokens in a window."),
        click.option("--text-column", help="Column of the dataset that holds the text."),
        click.option("--verbose", "-v", is_flag=True, help="Name every row of a dataset that is skipped."),
    ),
    "Files": (
        click.option("--format", "format", help=f"One of {', '.join(FORMATS)}."),
        click.option("--dtype", help="Type of scales and unquantized weights: auto, bfloat16, float16, float32."),
        click.option("--max-shard-size", type=Size(), help="Largest weight file.  [default: 5GB]"),
        REVISION,
        _flag("--resume", "Continue an interrupted run to the same output."),
        _flag("--overwrite", "Replace an output directory that is not empty."),
        click.option("--base-model", metavar="ORG/MODEL", help="Hub id of a model in a directory, for the card."),
        click.option(
            "--push-to-hub", metavar="NAME/MODEL", help="Upload the result to this hub repository, private if new."
        ),
        _flag("--trust-remote-code", "Run Python code from the model's repository."),
    ),
    "Measuring": (
        click.option(
            "--eval-windows",
            type=click.IntRange(min=0),
            default=4,
            show_default=True,
            help="Windows of held-out builtin text to score before and after; 0 for none.",
        ),
        click.option(
            "--eval",
            "measures",
            default=",".join(MEASURES),
            show_default=True,
            callback=lambda context, option, value: parse_measures(value),
            help="Measures on those windows: perplexity, divergence (kl); text is three prompts side by side.",
        ),
    ),
    "Output on the screen": OUTPUT_OPTIONS,
    "About": (
        _flag("--list-methods", "Show every method.", is_eager=True, expose_value=False, callback=_list_methods),
        click.version_option(__version__, prog_name="lowbit"),
    ),
}


def quantize_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with every option of PARTS, each with its part."""
    for part, options in reversed(PARTS.items()):
        for option in reversed(options):
            command = option(command)
            command.__click_params__[-1].part = part  # type: ignore[attr-defined]
    return command
