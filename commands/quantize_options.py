"""The options of `quantize` by part: common ones first."""

from collections.abc import Iterator
from pathlib import Path

import click

from lowbit.api.drafting import STEPS as STEPS_OF_DRAFTERS
from lowbit.calibrate.methods import CALIBRATION, METHODS
from lowbit.calibrate.mixtures import MIXTURES
from lowbit.calibrate.rounding import ROUNDERS
from lowbit.calibrate.settings import OWNERS, type_of
from lowbit.calibrate.transforms import TRANSFORMS
from lowbit.commands.common import DEVICE, OVERWRITE, REVISION, SHARD, TRUST, Size, say
from lowbit.commands.display import OUTPUT_OPTIONS
from lowbit.commands.parts import FIRST, LAST, Decorator, Parts, flag, value
from lowbit.evaluation.after import MEASURES, parse_measures
from lowbit.export.cache import CACHES
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.steps import STEPS
from lowbit.quant.scheme import NAMED

PATH = click.Path(path_type=Path)
GROUPED = [name for name, scheme in NAMED.items() if not scheme.weights.blocks]
BY_METHOD = "[default: by --method]"


def _list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        formatter = context.make_formatter()
        for method in METHODS.values():
            with formatter.section(method.name):
                formatter.write_dl([("does", method.summary), ("costs", method.cost), ("use it", method.use)])
        say(formatter.getvalue(), nl=False)
        context.exit()


def _settings_of_parts() -> Iterator[Decorator]:
    """One option per setting of a transform or rounder."""
    for name, part in OWNERS.items():
        about = part.settings()[name].metadata
        flags = (f"--{name.replace('_', '-')}", *about["flags"])
        yield click.option(*flags, name, type=type_of(part, name), help=about["text"])


PARTS: Parts = {
    FIRST: (
        click.option(
            "--model",
            "-m",
            "--model-path",
            help="Quantize this model: a directory, a hub id, or demo.  [default: the argument MODEL]",
        ),
        click.option("--method", help=f"Use this method: {', '.join(METHODS)}; see --list-methods.  [default: awq]"),
        click.option(
            "--output",
            "-o",
            "--output-dir",
            type=PATH,
            help="Write the result to this path, a new directory or a .gguf file.  [default: none, for a dry run]",
        ),
        click.option(
            "--scheme",
            help=f"Store weights in this scheme: {', '.join(GROUPED)}, int4-g128, uint4-g64 ...; or a mixture: "
            f"{', '.join(MIXTURES)}; in format gguf q4_k_m, q2_k, q4_0 and llama.cpp's other names; "
            f"docs/tutorials/choose-a-scheme.md helps to choose.  {BY_METHOD}",
        ),
        click.option(
            "--dataset",
            help="Calibrate on this text: builtin, a file, or NAME:CONFIG:SPLIT:N of a hub; several with commas.  "
            "[default: builtin, or none if the method reads no text]",
        ),
        DEVICE,
        click.option(
            "--recipe",
            "--config",
            "recipe_file",
            type=PATH,
            help="Read settings from this TOML file; options override it.  [default: none]",
        ),
        flag("--dry-run", text="Show the work without doing it: the plan, before any weight is read."),
    ),
    "Numbers": (
        click.option(
            "--bits", "--w-bit", "--wbits", type=int, help=f"Round weights to integers of 2 to 8 bits.  {BY_METHOD}"
        ),
        click.option(
            "--group-size",
            "--q-group-size",
            "--groupsize",
            type=int,
            help=f"Share a scale among this many weights; -1 is a whole channel.  {BY_METHOD}",
        ),
        click.option(
            "--sym/--asym", "symmetric", default=None, help="Use symmetric codes, or zero points.  [default: sym]"
        ),
        click.option(
            "--activations",
            help=f"Round the inputs of linears: none (16 bits), token or tensor (int8, static).  {BY_METHOD}",
        ),
        click.option(
            "--head", help="Round the output head to this scheme: int8, fp8, int4-g64 ...  [default: 16 bits]"
        ),
        click.option(
            "--kv-cache",
            help=f"Calibrate scales for FP8 keys and values: {' or '.join(CACHES)} (per head).  [default: none]",
        ),
        click.option(
            "--embeddings", help="Round the input embeddings to this scheme: int8, int4-g64 ...  [default: 16 bits]"
        ),
        click.option(
            "--ignore",
            "--ignore-layers",
            multiple=True,
            help="Leave these linears in 16 bits: names, parts of names, re:PATTERN.  [default: the output head]",
        ),
    ),
    "Budgets: schemes are chosen for the least loss": (
        click.option("--target-bits", type=float, help="Spend this many bits a linear weight.  [default: no budget]"),
        click.option(
            "--target-size", type=Size(), help="Spend this size on all weights: 12GiB, 500MB.  [default: no budget]"
        ),
        click.option(
            "--target-ms",
            type=float,
            help="Spend this many milliseconds a token of lowbit's engine, batch 1.  [default: no budget]",
        ),
        click.option("--target-gpu", help=f"Time --target-ms for this GPU: {', '.join(STEPS)}.  [default: H200]"),
        click.option(
            "--candidates", help="Choose among these schemes, with commas; 16bit too.  [default: by --scheme]"
        ),
    ),
    "Parts of a method": (
        click.option(
            "--transforms",
            help=f"Apply these before rounding, in order: {', '.join(TRANSFORMS)}; none for none.  {BY_METHOD}",
        ),
        click.option("--rounder", help=f"Choose codes by this rounder: {', '.join(ROUNDERS)}.  {BY_METHOD}"),
        click.option(
            "--clip/--no-clip",
            default=None,
            help=f"Search each group's clipping range for the least output error.  {BY_METHOD}",
        ),
        *_settings_of_parts(),
    ),
    "Tuning on the model's output": (
        click.option(
            "--distill-steps",
            type=int,
            help=f"Tune scales and norms on the model's output logits for this many steps.  {BY_METHOD}",
        ),
        click.option(
            "--distill-codes/--no-distill-codes",
            default=None,
            help=f"Tune codes too, in 16 bytes a weight of memory.  {BY_METHOD}",
        ),
        click.option(
            "--distill-tokens",
            type=click.IntRange(min=1),
            help="Tune on about this many tokens a step.  [default: 2048]",
        ),
        click.option(
            "--distill-samples",
            type=int,
            help="Tune on this many further windows, which the unquantized model writes itself.  [default: 0]",
        ),
    ),
    "A drafter": (
        click.option(
            "--drafter",
            help="Draft tokens with this head: an EAGLE-3 directory or hub id, which is tuned on text that the result "
            "writes, and written to OUTPUT-drafter.  [default: none]",
        ),
        click.option(
            "--drafter-steps",
            type=click.IntRange(min=1),
            help=f"Tune the drafter for this many steps.  [default: {STEPS_OF_DRAFTERS}]",
        ),
    ),
    "Calibration": (
        click.option(
            "--num-samples",
            "--nsamples",
            "--num-calibration-samples",
            "--calib-size",
            type=int,
            help=f"Calibrate on this many windows.  [default: {CALIBRATION['num_samples']}]",
        ),
        click.option(
            "--own-samples",
            type=int,
            help="Calibrate on this many further windows, which the unquantized model writes itself.  [default: 0]",
        ),
        click.option(
            "--own-prompt",
            type=int,
            help="Begin every second text of its own with this many tokens of the dataset.  [default: 0]",
        ),
        click.option(
            "--seqlen",
            "--max-seq-length",
            "--calib-seq",
            type=int,
            help=f"Cut the text into windows of this many tokens.  [default: {CALIBRATION['seqlen']}]",
        ),
        click.option("--text-column", help="Take the text from this column of a table.  [default: found by its name]"),
        click.option("--seed", type=int, help="Seed all random choices with this number.  [default: 42]"),
        flag("--verbose", "-v", text="Print details as well: every row of a dataset that is skipped."),
    ),
    "Files": (
        click.option(
            "--format", "format", help=f"Write this format: {', '.join(FORMATS)}.  [default: compressed-tensors]"
        ),
        click.option(
            "--dtype",
            help="Use this floating-point type for all that is not quantized: bfloat16, float16, float32, or auto for "
            "the model's own.  [default: auto]",
        ),
        SHARD,
        REVISION,
        flag("--model-free", text="Find linears by name and rewrite file by file, without a model class or data."),
        flag("--resume", text="Continue an interrupted run to the same output."),
        OVERWRITE,
        click.option(
            "--base-model",
            metavar="ORG/MODEL",
            help="Name this hub id in the card as the model of a directory.  [default: by the directory's own card]",
        ),
        click.option(
            "--push-to-hub",
            metavar="NAME/MODEL",
            help="Upload the result to this hub repository, private if new.  [default: no upload]",
        ),
        TRUST,
    ),
    "Measuring": (
        value(
            "--eval-windows",
            type=click.IntRange(min=0),
            default=4,
            text="Score this many windows of held-out builtin text before and after; 0 for none.",
        ),
        value(
            "--eval",
            "measures",
            default=",".join(MEASURES),
            callback=lambda context, option, value: parse_measures(value),
            text="Measure these: perplexity (ppl), divergence (kl), three prompts side by side (text).",
        ),
    ),
    "Output on the screen": OUTPUT_OPTIONS,
    LAST: (
        flag(
            "--list-methods",
            text="Show every method, its cost and when to use it.",
            is_eager=True,
            expose_value=False,
            callback=_list_methods,
        ),
    ),
}
