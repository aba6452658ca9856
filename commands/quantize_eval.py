"""`quantize-eval`: measure the quality of a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from lowbit import __version__
from lowbit.api import evaluating as api
from lowbit.commands.common import Size, run_command
from lowbit.commands.eval_console import Printer, setup_options
from lowbit.commands.parts import SETTINGS
from lowbit.evaluation.divergence import Divergence
from lowbit.evaluation.generate import PROMPTS, TOKENS, Prompt, read_prompts
from lowbit.evaluation.perplexity import Score, describe_difference
from lowbit.evaluation.sandbox import Limits
from lowbit.export.escape import one_line

MOST_SHOWN = 8


def main() -> None:
    """Entry point of the console script."""
    run_command(evaluate, "Interrupted; finished work is kept: the same command continues from there.")


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="lowbit")
def evaluate() -> None:
    """Measure a checkpoint, unquantized or quantized."""


def text_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for scoring a text: the keywords of TextSetup."""
    options = (
        click.option(
            "--text",
            default="builtin",
            show_default=True,
            help="UTF-8 file, or a table as quantize --dataset takes it, or builtin: held-out pydoc.",
        ),
        click.option("--text-column", help="Column of the table that holds the text."),
        click.option(
            "--protocol",
            type=click.Choice(["gptq", "strided"]),
            default="gptq",
            show_default=True,
            help="gptq: windows that do not overlap. strided: windows --stride apart, each token scored once.",
        ),
        click.option(
            "--context", "--length", "--seqlen", type=int, default=512, show_default=True, help="Tokens per window."
        ),
        click.option("--stride", type=int, help="Tokens between windows.  [default: half of --context]"),
        click.option(
            "--bos",
            type=click.Choice(["first", "every"]),
            default="first",
            show_default=True,
            help="Windows that begin with BOS, if the model's tokenizer puts BOS before a text.",
        ),
        click.option(
            "--windows",
            type=click.IntRange(min=1),
            help="Number of windows to score.  [default: 16 of builtin, all of a file]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@evaluate.command()
@setup_options
@text_options
def perplexity(**options: Any) -> None:
    """Perplexity of CHECKPOINT on a text; the last line is JSON."""
    printer = Printer(options)
    found = api.perplexity(progress=printer, **options)
    if found.baseline is not None:
        _print_loss(printer, found.score, found.baseline)
    printer.last(found.row)


def _print_loss(printer: Printer, score: Score, baseline: Score) -> None:
    change, windows = describe_difference(baseline, score), len(score.window_nll)
    printer.console.print(f"loss {change} nats per token (paired over {windows} windows)")


@evaluate.command()
@setup_options
@text_options
def divergence(**options: Any) -> None:
    """KL divergence of CHECKPOINT from --baseline, token by token; the last line is JSON."""
    if options["baseline"] is None:
        raise click.UsageError("name the model to compare with: --baseline MODEL")
    printer = Printer(options)
    found = api.divergence(progress=printer, **options)
    _print_loss(printer, found.divergence.quantized, found.divergence.baseline)
    _print_divergence(printer, found.divergence, found.row)
    printer.last(found.row)


def _print_divergence(printer: Printer, found: Divergence, row: dict[str, Any]) -> None:
    error = "" if found.mean_error is None else f" ± {found.mean_error:.5f}"
    printer.console.print(
        f"KL {found.mean:.5f}{error} nats a token; median {row['kl_median']:.5f}, 99% {row['kl_p99']:.4f}, "
        f"99.9% {row['kl_p999']:.4f}, largest {row['kl_max']:.3f}; "
        f"the same most likely token at {found.top1:.2%} of {found.quantized.tokens} positions"
    )
    table = Table("KL", "before", "next", "baseline expected", "quantized expects", title="worst tokens")
    for each in found.worst[:MOST_SHOWN]:
        expected = (f"{each[name]['token']!r} {each[name]['chance']:.0%}" for name in ("baseline", "quantized"))
        table.add_row(f"{each['kl']:.2f}", *map(Text, (repr(each["before"][-48:]), repr(each["next"]), *expected)))
    printer.console.print(table)


@evaluate.command()
@setup_options
@click.option("--tasks", "names", required=True, help="Names, patterns or YAML files, with commas.")
@click.option("--include", type=click.Path(path_type=Path), help="Directory with your own task files.")
@click.option("--fewshot", type=click.IntRange(min=0), help="Examples before a question.  [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="Questions per task.  [default: all]")
@click.option("--allow-code", is_flag=True, help="Run the Python code in task files.")
def tasks(
    names: str, include: Path | None, fewshot: int | None, limit: int | None, allow_code: bool, **options: Any
) -> None:
    """Tasks of lm-evaluation-harness; the last line is JSON."""
    printer = Printer(options)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    settings: dict[str, Any] = {"include": include, "fewshot": fewshot, "limit": limit, "allow_code": allow_code}
    rows = api.evaluate(tasks=wanted, progress=printer, **settings, **options)
    _print_tasks(printer, rows, [options["checkpoint"], options["baseline"]])
    printer.last({"evaluation": "tasks", "rows": rows})


def _print_tasks(printer: Printer, rows: list[api.Row], models: list[str | None]) -> None:
    printer.display.stop()
    table = Table("task", "metric", "examples", *(model for model in reversed(models) if model))
    for row in rows:
        measured = [row["baseline"], row] if "baseline" in row else [row]
        values = [f"{each['value']:.4f}" + (f" ± {each['stderr']:.4f}" if each["stderr"] else "") for each in measured]
        table.add_row(row["task"], row["metric"], str(row["examples"]), *values)
    printer.console.print(table)


@evaluate.command()
@setup_options
@click.option("--prompts", type=click.Path(path_type=Path), help=".txt, one a line; or .jsonl of prompt or messages.")
@click.option("--prompt", multiple=True, help=f"A prompt; may be given again.  [default: {len(PROMPTS)} short ones]")
@click.option("--tokens", type=click.IntRange(min=1), default=TOKENS, show_default=True, help="Tokens to write.")
def generate(prompts: Path | None, prompt: tuple[str, ...], tokens: int, **options: Any) -> None:
    """Greedy continuations by the baseline and by CHECKPOINT; the last line is JSON."""
    printer = Printer(options)
    asked = [Prompt(text) for text in prompt] + (read_prompts(prompts) if prompts else [])
    row = api.continuations(prompts=asked, tokens=tokens, progress=printer, **options)
    printer.display.stop()
    models = [name for name in (options["checkpoint"], options["baseline"]) if name]
    for each in row["rows"]:
        printer.console.print(Text(each["prompt"], style="bold"))
        for name, text in reversed(list(zip(models, each["texts"], strict=True))):
            printer.console.print(f"  {name}: {' '.join(text.split())}")
    if options["baseline"]:
        printer.console.print(f"{row['equal']} of {row['prompts']} continuations are the same")
    printer.last(row)


@evaluate.command()
@setup_options
@click.option("--problems", type=click.Path(path_type=Path), required=True, help=".jsonl in HumanEval's layout.")
@click.option("--allow-code", is_flag=True, help="Run the programs that the model writes, in a sandbox.")
@click.option("--tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer in tokens.")
@click.option("--seconds", type=click.IntRange(min=1), default=10, show_default=True, help="Time limit of a program.")
@click.option("--memory", type=Size(), default="1GB", show_default=True, help="Memory limit of a program.")
@click.option("--limit", type=click.IntRange(min=1), help="Problems.  [default: all]")
def code(
    problems: Path, allow_code: bool, tokens: int, seconds: int, memory: int, limit: int | None, **options: Any
) -> None:
    """pass@1 on programming problems; the last line is JSON."""
    printer = Printer(options)
    settings: dict[str, Any] = {"problems": problems, "allow_code": allow_code, "tokens": tokens, "limit": limit}
    row = api.programs(limits=Limits(seconds, memory), progress=printer, **settings, **options)
    printer.display.stop()
    for found in (row["baseline"], row) if "baseline" in row else (row,):
        failed = [each for each in found["rows"] if not each["passed"]]
        passed = f"{len(found['rows']) - len(failed)} of {len(found['rows'])} problems"
        printer.console.print(f"{found['model']}: pass@1 {found['pass_at_1']:.4f}, {passed}")
        for each in failed[:MOST_SHOWN]:
            printer.console.print(one_line(f"  {each['task_id']}: {each['reason']}"))
    printer.last(row)
