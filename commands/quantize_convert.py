"""`quantize-convert IN OUT --format gptq`: rewrite a checkpoint in another format or scheme, without requantizing."""

from pathlib import Path

import click
from rich.console import Console

from lowbit.api import converting as api
from lowbit.commands.common import OVERWRITE, REVISION, SHARD, TRUST, make_console, run_command
from lowbit.commands.parts import FIRST, Parts, by_part, frame
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import describe_schemes
from lowbit.export.staging import told_whole
from lowbit.quant.recipe import Recipe


def main() -> None:
    """Entry point of the console script."""
    run_command(quantize_convert)


PARTS: Parts = {
    FIRST: (
        click.option(
            "--format",
            "format_name",
            help=f"Write this format: {', '.join(FORMATS)}.  [default: what OUTPUT asks for, its own]",
        ),
        click.option(
            "--scheme",
            help="Store weights in this scheme, which holds the same values: nvfp4-a16 or fp8-block for MXFP4.  "
            "[default: its own]",
        ),
    ),
    "Files": (SHARD, REVISION, OVERWRITE, TRUST),
}


@click.command(
    **frame(
        "lowbit convert demo-awq demo-gptq --format gptq",
        "lowbit convert demo-w4 demo.gguf",
        "lowbit convert model.gguf model-w4",
    )
)
@click.argument("checkpoint")
@click.argument("output", type=click.Path(path_type=Path))
@by_part(PARTS)
def quantize_convert(
    checkpoint: str,
    output: Path,
    format_name: str | None,
    scheme: str | None,
    max_shard_size: int | None,
    revision: str | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """Write CHECKPOINT, a quantized model, to OUTPUT in another format or scheme; weights keep their values."""
    console = make_console()
    with console.status("converting"):
        done = api.convert(
            checkpoint,
            output,
            format=format_name,
            scheme=scheme,
            max_shard_size=max_shard_size or Recipe.max_shard_size,
            revision=revision,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
    with told_whole(output):
        _print(console, done)


def _print(console: Console, done: api.Converted) -> None:
    """Print both checkpoints, and every difference in the weights."""
    conversion = done.conversion
    console.print(f"{done.source}: {done.source_format}, {describe_schemes(done.source_schemes)}")
    console.print(f"{done.output}: {done.format}, {describe_schemes(conversion.schemes)}")
    for rewrite, count in conversion.rewrites.items():
        console.print(f"  {rewrite}: {count} linears, the same weights")
    console.print(f"{conversion.exact} linears have bit-identical weights")
    if conversion.caveat:
        console.print(conversion.caveat)
    if conversion.rounded:
        name, change = max(conversion.rounded.items(), key=lambda item: item[1])
        console.print(
            f"{len(conversion.rounded)} linears have scales that are rounded to {FORMATS[done.format].scale_dtype}: "
            f"the format has no other; the largest relative change is {change:.2g}, in {name}"
        )
