"""`quantize-inspect DIR`: show the contents of a quantized checkpoint, and the engines that run it."""

import json

import click
from rich.console import Console
from rich.table import Table

from lowbit.api import inspecting as api
from lowbit.commands.common import REVISION, TRUST, make_console, run_command
from lowbit.commands.parts import FIRST, Parts, by_part, flag, frame
from lowbit.export.engines.llama_cpp import LLAMA_CPP
from lowbit.export.engines.table import ENGINES
from lowbit.export.engines.verdicts import describe
from lowbit.export.inspection import Inspection

MOST_NAMED = 8


def main() -> None:
    """Entry point of the console script."""
    run_command(quantize_inspect)


PARTS: Parts = {
    FIRST: (
        flag("--check", text="Read every weight as well, and verify every checksum."),
        flag("--json", "as_json", text="Print JSON alone, one object with every linear by name."),
    ),
    "Files": (REVISION, TRUST),
}


@click.command(**frame("lowbit inspect demo-awq", "lowbit inspect demo-awq --check --json"))
@click.argument("checkpoint")
@by_part(PARTS)
def quantize_inspect(
    checkpoint: str, as_json: bool, check: bool, revision: str | None, trust_remote_code: bool
) -> None:
    """Show schemes, sizes and coverage of CHECKPOINT, and the kernels with which engines run it."""
    found = api.inspect(checkpoint, check=check, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    console = make_console()
    _print_weights(console, found)
    _print_engines(console, found)
    if found.checked_files is not None:
        console.print(f"read: {len(found.linears)} weights, {found.checked_files} files with known checksums")


def _print_weights(console: Console, found: Inspection) -> None:
    """Print schemes by role, sizes, and linears left in 16 bits."""
    table = Table(title=f"{found.format}, {len(found.linears)} quantized linears", title_justify="left")
    for column in ("linears", "scheme", "outputs x inputs", "count"):
        table.add_column(column)
    for (role, scheme, n, k), count in found.roles().items():
        table.add_row(role, str(scheme), f"{n} x {k}", str(count))
    console.print(table)
    nbytes = sum(linear.nbytes for linear in found.linears.values())
    console.print(
        f"{found.bits_per_weight:.3f} bits a weight, {nbytes / 1e6:.1f} MB, and {found.other_bytes / 1e6:.1f} MB of "
        f"everything else; coverage {found.coverage:.2%} of the linear parameters"
    )
    for name, size in list(found.left.items())[:MOST_NAMED]:
        console.print(f"  left {name}: {size / 1e6:.1f} M parameters")
    if len(found.left) > MOST_NAMED:
        console.print(f"  and {len(found.left) - MOST_NAMED} others")
    for key, members in found.split.items():
        console.print(f"  {key}: engines run {', '.join(members)} as one, and their schemes differ", style="bold")
    for key, members in found.parents.items():
        console.print(
            f"  {key}: vLLM takes the largest global scale for {', '.join(members)}, and theirs differ: it decodes the "
            "others wrongly",
            style="bold",
        )
    if not found.split:
        console.print("fused sets (q, k and v; gate and up; experts): one scheme each")


def _print_engines(console: Console, found: Inspection) -> None:
    """Print kernels by machine and engine, and the possible sizes of tensor parallelism."""
    table = Table(title="kernels (linears, those that run fused as one)", title_justify="left")
    for column in ("machine", *found.opened):
        table.add_column(column)
    for machine, row in found.kernels.items():
        cells = (
            ", ".join(f"{kernel or 'none'} {count}" for kernel, count in row[engine].items()) for engine in found.opened
        )
        table.add_row(machine, *cells)
    console.print(table)
    for name in found.opened:
        console.print(f"{name} {ENGINES[name].version}: {describe(found.verdicts[name])}")
    if found.for_llama_cpp is not None:
        console.print(f"{LLAMA_CPP.name}: the same weights after {found.for_llama_cpp}")
    reasons = {
        (engine, reason): machine
        for machine, row in found.refusals.items()
        for engine, refused in row.items()
        if engine in found.opened
        for reason in refused
    }
    for (engine, reason), machine in reasons.items():
        console.print(f"  {engine}, {machine}: {reason}")
    fits = [str(size) for size, reason in found.parallel.items() if reason is None]
    console.print(f"tensor parallel over {', '.join(fits)} GPUs")
    for size, obstacle in found.parallel.items():
        if obstacle is not None:
            console.print(f"  not {size}: {obstacle}")
