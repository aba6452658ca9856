"""`quantize-convert IN OUT --format gptq`: the same weights in another format, nothing requantized."""

from pathlib import Path

import click
from rich.console import Console

from lowbit import __version__
from lowbit.calibrate.plan import unquantized_linears
from lowbit.commands.common import SETTINGS, Size, make_console, run_command
from lowbit.errors import RecipeError
from lowbit.export.card import note_conversion
from lowbit.export.checkpoint import UNSEALED_CONFIG, seal, verify_checksums
from lowbit.export.convert import Conversion, convert
from lowbit.export.formats import FORMATS, LogicalTensors, describe_schemes
from lowbit.export.staging import refuse_output, refuse_to_replace, require_space, staged, told_whole
from lowbit.export.writer import copy_companions
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from lowbit.quant.recipe import Recipe, nearest


def main() -> None:
    """Entry point of the console script."""
    run_command(quantize_convert)


@click.command(context_settings=SETTINGS)
@click.argument("checkpoint")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--format", "format_name", required=True, help=f"One of {', '.join(FORMATS)}.")
@click.option("--max-shard-size", type=Size(), default=Recipe.max_shard_size, help="Of a weight file.  [default: 5GB]")
@click.option("--overwrite", is_flag=True, help="Replace an output directory that is not empty.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@click.version_option(__version__, prog_name="lowbit")
def quantize_convert(
    checkpoint: str, output: Path, format_name: str, max_shard_size: int, overwrite: bool, trust_remote_code: bool
) -> None:
    """Write CHECKPOINT, a quantized model, to OUTPUT in another format; codes and scales stay what they are."""
    console = make_console()
    if format_name not in FORMATS:
        raise RecipeError(f"unknown format {format_name!r}; {nearest(format_name, FORMATS)}")
    refuse_output(output, overwrite)
    source = open_source(checkpoint, trust_remote_code)
    refuse_to_replace(output, source.directory)
    logical, fmt = LogicalTensors(source.checkpoint), FORMATS[format_name]
    left = unquantized_linears(open_skeleton(source), logical.schemes)
    require_space(output, int(source.checkpoint.nbytes * 1.1) + 50_000_000)
    verify_checksums(source.checkpoint)
    with staged(output, overwrite) as staging:
        with console.status("converting"):
            done = convert(logical, fmt, left, staging, max_shard_size, UNSEALED_CONFIG)
        copy_companions(source.directory, staging, with_code=trust_remote_code)
        assert logical.format is not None
        note_conversion(staging, source.directory, logical.format.name, fmt, __version__)
        seal(staging)
    with told_whole(output):
        _print(console, logical, done, output, format_name)


def _print(console: Console, source: LogicalTensors, done: Conversion, output: Path, format_name: str) -> None:
    """What was read, what was written, and where the two are not the same to the bit."""
    assert source.format is not None
    console.print(f"{source.checkpoint.directory}: {source.format.name}, {describe_schemes(source.schemes)}")
    console.print(f"{output}: {format_name}, {describe_schemes(done.schemes)}")
    for rewrite, count in done.rewrites.items():
        console.print(f"  {rewrite}: {count} linears, the same weights")
    console.print(f"{done.exact} linears stand for the same weights bit for bit")
    if done.rounded:
        name, change = max(done.rounded.items(), key=lambda item: item[1])
        console.print(
            f"{len(done.rounded)} linears have scales that are rounded to {FORMATS[format_name].scale_dtype}: the "
            f"format has no other; the largest relative change is {change:.2g}, in {name}"
        )
