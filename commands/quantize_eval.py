"""`quantize-eval`: measure the quality of a checkpoint."""

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from lowbit import __version__
from lowbit.api import evaluating as api
from lowbit.commands.common import Size, run_command
from lowbit.commands.eval_console import SETUP, Printer
from lowbit.commands.parts import SETTINGS, Named, Parts, by_part, epilog, flag, frame, value
from lowbit.evaluation.divergence import Divergence
from lowbit.evaluation.generate import PROMPTS, TOKENS, Prompt, read_prompts
from lowbit.evaluation.perplexity import Score, describe_difference
from lowbit.evaluation.sandbox import Limits
from lowbit.export.escape import one_line

MOST_SHOWN = 8


def main() -> None:
    """Entry point of the console script."""
    run_command(evaluate, "Interrupted; finished work is kept: the same command continues from there.")


@click.group(
    cls=Named,
    context_settings=SETTINGS,
    epilog=epilog(
        "lowbit eval perplexity demo-awq --baseline demo", "lowbit eval generate demo-awq --baseline demo --record"
    ),
)
@click.version_option(__version__, prog_name="lowbit")
def evaluate() -> None:
    """Measure a checkpoint, unquantized or quantized.

    The last line of the output is JSON.
    """


TEXT: Parts = {  # the keywords of TextSetup
    "Text": (
        value(
            "--text",
            default="builtin",
            text="Score this text: a UTF-8 file, a table as quantize --dataset takes it, or builtin: held-out pydoc.",
        ),
        click.option("--text-column", help="Take the text from this column of a table.  [default: found by its name]"),
        value(
            "--protocol",
            type=click.Choice(["gptq", "strided"]),
            default="gptq",
            text="Cut the text so: gptq into windows that do not overlap; strided into windows --stride apart, and "
            "each token is scored once.",
        ),
        value(
            "--context",
            "--length",
            "--seqlen",
            type=int,
            default=512,
            text="Read at most this many tokens at once: a window.",
        ),
        click.option(
            "--stride",
            type=int,
            help="Begin a window this many tokens after the one before.  [default: half of --context]",
        ),
        value(
            "--bos",
            type=click.Choice(["first", "every"]),
            default="first",
            text="Begin these windows with BOS, if the model's tokenizer puts BOS before a text.",
        ),
        click.option(
            "--windows",
            type=click.IntRange(min=1),
            help="Score this many windows.  [default: 16 of builtin, all of a file]",
        ),
    )
}


@evaluate.command(
    **frame(
        "lowbit eval perplexity demo-awq --baseline demo",
        "lowbit eval perplexity demo-awq --baseline demo --text wiki.txt --context 2048 --record",
    )
)
@click.argument("checkpoint")
@by_part(TEXT | SETUP)
def perplexity(**options: Any) -> None:
    """Measure the perplexity of CHECKPOINT on a text."""
    printer = Printer(options)
    found = api.perplexity(progress=printer, **options)
    if found.baseline is not None:
        _print_loss(printer, found.score, found.baseline)
    printer.last(found.row)


def _print_loss(printer: Printer, score: Score, baseline: Score) -> None:
    change, windows = describe_difference(baseline, score), len(score.window_nll)
    printer.console.print(f"loss {change} nats per token (paired over {windows} windows)")


@evaluate.command(**frame("lowbit eval divergence demo-awq --baseline demo --record"))
@click.argument("checkpoint")
@by_part(TEXT | SETUP)
def divergence(**options: Any) -> None:
    """Measure the KL divergence of CHECKPOINT from --baseline."""
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


LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Ask at most this many questions.  [default: all]")
TASKS: Parts = {
    "Tasks": (
        click.option("--tasks", "names", required=True, help="Run these: names, patterns or YAML files, with commas."),
        click.option(
            "--include",
            type=click.Path(path_type=Path),
            help="Find your own task files in this directory.  [default: none]",
        ),
        click.option(
            "--fewshot",
            type=click.IntRange(min=0),
            help="Show this many examples before a question.  [default: the task's own]",
        ),
        LIMIT,
        flag("--allow-code", text="Run Python code: that of your own task files."),
    )
}


@evaluate.command(**frame("lowbit eval tasks demo-awq --baseline demo --tasks arc_easy,hellaswag --limit 200 --record"))
@click.argument("checkpoint")
@by_part(TASKS | SETUP)
def tasks(
    names: str, include: Path | None, fewshot: int | None, limit: int | None, allow_code: bool, **options: Any
) -> None:
    """Run tasks of lm-evaluation-harness."""
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


PROMPTING: Parts = {
    "Prompts": (
        click.option(
            "--prompt",
            multiple=True,
            help=f"Continue this text; may be given again.  [default: {len(PROMPTS)} short ones]",
        ),
        click.option(
            "--prompts",
            type=click.Path(path_type=Path),
            help="Continue the texts of this file: .txt, one a line; or .jsonl of prompt or messages.  [default: none]",
        ),
        value(
            "--tokens",
            type=click.IntRange(min=1),
            default=TOKENS,
            text="Write at most this many tokens.",
        ),
    )
}


@evaluate.command(**frame("lowbit eval generate demo-awq --baseline demo --record"))
@click.argument("checkpoint")
@by_part(PROMPTING | SETUP)
def generate(prompts: Path | None, prompt: tuple[str, ...], tokens: int, **options: Any) -> None:
    """Continue prompts with the baseline and with CHECKPOINT."""
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


PROBLEMS: Parts = {
    "Problems": (
        click.option(
            "--problems",
            type=click.Path(path_type=Path),
            required=True,
            help="Solve the problems of this file: .jsonl in HumanEval's layout.",
        ),
        flag("--allow-code", text="Run Python code: the programs that the model writes, in a sandbox."),
        value(
            "--tokens",
            type=click.IntRange(min=1),
            default=512,
            text="Write at most this many tokens.",
        ),
        value(
            "--seconds",
            type=click.IntRange(min=1),
            default=10,
            text="Stop a program after this many seconds.",
        ),
        value("--memory", type=Size(), default="1GB", text="Stop a program that takes this memory."),
        LIMIT,
    )
}


@evaluate.command(**frame("lowbit eval code demo-awq --baseline demo --problems HumanEval.jsonl --allow-code"))
@click.argument("checkpoint")
@by_part(PROBLEMS | SETUP)
def code(
    problems: Path, allow_code: bool, tokens: int, seconds: int, memory: int, limit: int | None, **options: Any
) -> None:
    """Measure pass@1 on programming problems."""
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
