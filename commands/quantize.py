"""`quantize MODEL --method awq --output DIR`: a language model in, a checkpoint that engines load out."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lowbit import __version__
from lowbit.calibrate import ranks
from lowbit.calibrate.budget import average_bits, spend
from lowbit.calibrate.data import CalibrationSet, builtin_text, calibration_tokens
from lowbit.calibrate.methods import METHODS, ROUNDERS, TRANSFORMS, complete_recipe
from lowbit.calibrate.pipeline import BlockReport, Job, Result, assist, prepare, run
from lowbit.calibrate.resume import Journal, journaled
from lowbit.commands.common import SETTINGS, Size, check_device, make_console, run_command
from lowbit.errors import RecipeError
from lowbit.evaluation.after import MEASURES, Measured, measure, parse_measures
from lowbit.evaluation.perplexity import Score, describe_difference
from lowbit.evaluation.record import record
from lowbit.evaluation.report.facts import facts_of
from lowbit.evaluation.report.page import render
from lowbit.export.card import write_card
from lowbit.export.checkpoint import UNSEALED_CONFIG, seal
from lowbit.export.files import write_text
from lowbit.export.formats import FORMATS, describe_schemes
from lowbit.export.staging import only_run, refuse_output, refuse_to_replace, require_space, staged, told_whole
from lowbit.models.source import Source, open_source
from lowbit.quant.recipe import Recipe, nearest, read_recipe

RECIPE_FLAGS = [
    "method",
    "transforms",
    "rounder",
    "clip",
    "bits",
    "group_size",
    "symmetric",
    "activations",
    "target_bits",
    "alpha",
    "damping",
    "iters",
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
]


def main() -> None:
    """Entry point of the console script."""
    run_command(quantize, "Interrupted; nothing was written. Blocks that were finished are kept: see --resume.")


def _list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        for method in METHODS.values():
            click.echo(f"{method.name:8} {method.summary}")
        context.exit()


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
@click.option("--alpha", "--smoothing-strength", type=float, help="SmoothQuant's strength, 0 to 1; searched if unsaid.")
@click.option("--damping", "--damp-percent", "--percdamp", type=float, help="GPTQ's damping, a fraction: 0.01.")
@click.option("--iters", type=int, help="Steps of learned rounding a block.")
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
    ranks.join()
    console = make_console()
    recipe = _recipe(recipe_file, flags)
    name = _model_name(model_argument, model)
    if output is None and not flags["dry_run"]:
        raise click.UsageError("say where to write: --output DIR")
    if output is not None:
        _reserve(output, flags["overwrite"])
    console.print(f"[bold]recipe[/bold]\n{recipe.to_toml()}", end="")
    with ranks.leader_first():
        source = open_source(name, flags["trust_remote_code"], flags["revision"])
    if output is not None:
        refuse_to_replace(output, source.directory)
    job = prepare(source, recipe, ranks.own_device(check_device(flags["device"])))
    _print_plan(console, job)
    if output is None or flags["dry_run"]:
        return
    with ranks.leader_first():
        calibration = _calibration(recipe, source)
    _print_readings(console, calibration, flags["verbose"])
    if recipe.target_bits is not None and calibration is not None:
        with console.status("measuring what each scheme costs"):
            job = spend(job, calibration)
        _print_plan(console, job)
        console.print(f"  {average_bits(job):.4f} bits a weight, scales counted; {recipe.target_bits} allowed")
    require_space(output, int(job.output_bytes() * 3.05) + 50_000_000)
    begun = time.monotonic()
    if not ranks.leads():
        with journaled(output, job, calibration, flags["resume"]) as journal:
            assist(job, calibration, journal)
        ranks.leave()
        return
    with journaled(output, job, calibration, flags["resume"]) as journal, staged(output, flags["overwrite"]) as staging:
        _print_journal(console, journal, flags["resume"])
        on_block = _block_printer(console, len(job.skeleton.blocks))
        with console.status("quantizing"):
            result = run(job, staging, calibration, on_block, journal, UNSEALED_CONFIG)
        ranks.leave()
        measured = _evaluate(console, source, staging, flags, job.device)
        _write_papers(staging, job, result, measured, output.resolve().name)
    with told_whole(output):
        _print_summary(console, output, result, measured.scores, time.monotonic() - begun)


def _reserve(output: Path, overwrite: bool) -> None:
    """Refuse an output that cannot become the result, and keep other runs away from it until the command ends."""
    if ranks.leads() and output.parent.is_dir():
        click.get_current_context().with_resource(only_run(output))
    refuse_output(output, overwrite)


def _recipe(recipe_file: Path | None, flags: dict[str, Any]) -> Recipe:
    values = read_recipe(recipe_file) if recipe_file else {}
    given = {key: flags[key] for key in RECIPE_FLAGS if flags[key] not in (None, ())}
    if "ignore" in given:
        given["ignore"] = _names(*given["ignore"])
    if "transforms" in given:
        given["transforms"] = _names(given["transforms"].replace("none", ""))
    recipe = complete_recipe(values | given)
    if recipe.format not in FORMATS:
        raise RecipeError(f"unknown format {recipe.format!r}; {nearest(recipe.format, FORMATS)}")
    return recipe


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


def _calibration(recipe: Recipe, source: Source) -> CalibrationSet | None:
    if recipe.dataset is None:
        return None
    tokens = calibration_tokens(
        recipe.dataset, source.tokenizer(), recipe.num_samples, recipe.seqlen, recipe.seed, recipe.text_column
    )
    source.require_known(tokens.ids)
    if recipe.calibration_sha256 not in (None, tokens.sha256):
        click.echo(
            f"Warning: the recipe was made with calibration tokens {recipe.calibration_sha256}, these are "
            f"{tokens.sha256}: another tokenizer, text or Python version; the weights will differ",
            err=True,
        )
    return tokens


def _print_readings(console: Console, calibration: CalibrationSet | None, verbose: bool) -> None:
    for reading in calibration.readings if calibration else ():
        if text := reading.describe():
            console.print(f"  note: {text}", markup=False)
        for line in reading.skipped if verbose else ():
            console.print(f"  {reading.label}, {line}", markup=False)


def _print_plan(console: Console, job: Job) -> None:
    exempt = sum(left.exempt for left in job.plan.left.values())
    console.print(
        f"[bold]plan[/bold] {describe_schemes(job.plan.schemes)}; {len(job.plan.left)} left ({exempt} on purpose); "
        f"coverage {job.plan.coverage:.2%}; "
        f"weights {job.source.checkpoint.nbytes / 1e6:.1f} MB -> {job.output_bytes() / 1e6:.1f} MB"
    )
    for name, left in list(job.plan.left.items())[:8]:
        console.print(f"  left {name}: {left.reason}")
    for warning in job.warnings():
        console.print(f"  note: {warning}")


def _print_journal(console: Console, journal: Journal, resume: bool) -> None:
    if journal.damage:
        console.print(f"  note: {journal.damage}; what follows is done again")
    if journal.finished:
        console.print(f"{journal.finished} blocks were finished before, in {journal.directory}")
    elif journal.directory.exists() and not resume:
        console.print(f"  note: {journal.directory} is of an interrupted run; stop and add --resume to go on there")


def _block_printer(console: Console, total: int) -> Callable[[BlockReport], None]:
    begun = time.monotonic()

    def show(report: BlockReport) -> None:
        done = report.index + 1
        left = (time.monotonic() - begun) / done * (total - done)
        loss = "" if report.loss is None else f"loss {report.loss:.5f}  "
        peak = f"peak {report.peak_bytes / 1e9:.2f} GB"
        console.print(f"block {done:3}/{total}  {loss}{report.seconds:6.1f} s  left {_clock(left)}  {peak}")

    return show


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _evaluate(console: Console, source: Source, staging: Path, flags: dict[str, Any], device: str) -> Measured:
    """Original and result on text that calibration never takes."""
    with console.status("measuring what was lost"):
        written = open_source(str(staging), source.trust_remote_code, config_name=UNSEALED_CONFIG)
        return measure(source, written, builtin_text("heldout"), flags["eval_windows"], flags["measures"], device)


def _write_papers(staging: Path, job: Job, result: Result, measured: Measured, name: str) -> None:
    """The measurements, the report where there are any, the model card and the sums; `name` is the checkpoint's."""
    labels = (Path(job.source.name).name, f"{result.recipe.method} {result.recipe.scheme}")
    record(staging, measured.labelled(*labels))
    facts = {
        "version": __version__,
        "schemes": describe_schemes(result.plan.schemes),
        "source_bytes": result.source_bytes,
        "output_bytes": result.output_bytes,
        "coverage": result.plan.coverage,
        "scores": [score.as_json() | {"model": label} for score, label in zip(measured.scores, labels, strict=False)],
        "divergence": measured.divergence,
        "text": "held-out part of the documentation that ships with CPython (pydoc_data)",
        "warnings": job.warnings(),
    }
    write_card(staging, job.source.directory, job.source.name, result.recipe, facts)
    if measured.rows:
        facts = facts_of(staging, name=name, config_name=UNSEALED_CONFIG)
        write_text(staging / "report.html", render(facts, "html"))
    seal(staging)


def _print_summary(console: Console, output: Path, result: Result, scores: tuple[Score, ...], seconds: float) -> None:
    table = Table(title=str(output), title_justify="left")
    for column in ("", "original", "quantized"):
        table.add_column(column)
    table.add_row("weights", f"{result.source_bytes / 1e6:.1f} MB", f"{result.output_bytes / 1e6:.1f} MB")
    if scores:
        table.add_row("perplexity", *(f"{score.perplexity:.4f}" for score in scores))
        table.add_row("loss, nats", f"{scores[0].nll:.5f}", f"{scores[1].nll:.5f} ({describe_difference(*scores)})")
    console.print(table)
    if scores:
        console.print(f"{scores[0].tokens} tokens of builtin held-out text, {scores[0].context} a window, float32")
    console.print(f"{_clock(seconds)} minutes")
