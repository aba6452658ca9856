"""`quantize-eval`: what a checkpoint lost."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from lowbit import __version__
from lowbit.commands.common import SETTINGS, Size, run_command
from lowbit.commands.eval_session import Session, make_session, note_text, read_text, row_of, session_options
from lowbit.errors import UsageError
from lowbit.evaluation.code import pass_at_1, read_problems, solve
from lowbit.evaluation.divergence import Divergence, require_comparable
from lowbit.evaluation.divergence import divergence as compare_distributions
from lowbit.evaluation.generate import PROMPT, Prompt, continuations, read_prompts, side_by_side
from lowbit.evaluation.perplexity import Score, describe_difference, difference
from lowbit.evaluation.perplexity import perplexity as score_text
from lowbit.evaluation.sandbox import Limits, require_containment
from lowbit.evaluation.tasks import TaskList, run_tasks
from lowbit.evaluation.text import Protocol, cut, require_same_tokens


def main() -> None:
    """Entry point of the console script."""
    run_command(evaluate, "Interrupted; what was finished is kept: the same command goes on from there.")


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="lowbit")
def evaluate() -> None:
    """Measure a checkpoint, unquantized or quantized."""


def text_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the subcommands that score a text; `make_protocol` takes them."""
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
            "--context", "--length", "--seqlen", type=int, default=512, show_default=True, help="Tokens a window."
        ),
        click.option("--stride", type=int, help="Tokens between windows.  [default: half of --context]"),
        click.option(
            "--bos",
            type=click.Choice(["first", "every"]),
            default="first",
            show_default=True,
            help="Windows that begin with the BOS that the model's tokenizer puts before a text.",
        ),
        click.option(
            "--windows",
            type=click.IntRange(min=1),
            help="Score only the first so many.  [default: 16 of builtin, all of a file]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def make_protocol(
    text: str, protocol: str, context: int, stride: int | None, windows: int | None, bos: str, **rest: Any
) -> Protocol:
    """The protocol that the options of `text_options` ask for."""
    if stride is not None and protocol != "strided":
        raise click.UsageError("--stride belongs to --protocol strided")
    step = (stride or max(context // 2, 1)) if protocol == "strided" else None
    return Protocol(context, step, windows or (16 if text == "builtin" else None), bos == "every")


@evaluate.command()
@session_options
@text_options
def perplexity(**options: Any) -> None:
    """Perplexity of CHECKPOINT on a text; the last line is JSON."""
    session = make_session(options)
    protocol = make_protocol(**options)
    sources = [session.source(name) for name in session.models()]
    text, read = read_text(options["text"], options["text_column"], sources[0])
    cuts = [cut(text, source, protocol) for source in sources]
    note_text(session, cuts[0], read)
    for source, its_cut in zip(sources[1:], cuts[1:], strict=True):
        require_same_tokens(sources[0], source, cuts[0], its_cut)
    scores = []
    for source, its_cut in zip(sources, cuts, strict=True):
        backend = session.open(source)
        with session.progress(backend) as on_step:
            scores.append(score_text(backend, its_cut, session.library, on_step))
        session.console.print(_line(scores[-1]))
    about = {"evaluation": "perplexity", "text": options["text"]} | row_of(read)
    session.finish(about | _score_row(session, scores))


def _score_row(session: Session, scores: list[Score]) -> dict[str, Any]:
    """The row of one score, or of a score and its baseline's, whose difference it prints."""
    row = scores[0].as_json()
    if len(scores) == 2:
        delta, error = difference(*scores)
        change = describe_difference(scores[1], scores[0])
        session.console.print(f"loss {change} nats per token (paired over {len(scores[0].window_nll)} windows)")
        row |= {
            "baseline": scores[1].as_json(),
            "delta_nll": round(delta, 6),
            "delta_nll_se": None if error is None else round(error, 6),
        }
    return row


@evaluate.command()
@session_options
@text_options
def divergence(**options: Any) -> None:
    """How far CHECKPOINT's distributions are from those of --baseline; the last line is JSON."""
    session = make_session(options)
    if session.baseline is None:
        raise click.UsageError("say what CHECKPOINT is compared with: --baseline MODEL")
    protocol = make_protocol(**options)
    ours, theirs = (session.open(session.source(name), together=2) for name in session.models())
    text, read = read_text(options["text"], options["text_column"], ours.source)
    cuts = [cut(text, backend.source, protocol) for backend in (ours, theirs)]
    note_text(session, cuts[0], read)
    require_comparable(ours, theirs, *cuts)
    with session.progress(ours, theirs) as on_step:
        found = compare_distributions(ours, theirs, cuts[0], session.library, on_step)
    for score in (found.quantized, found.baseline):
        session.console.print(_line(score))
    row = _score_row(session, [found.quantized, found.baseline]) | found.as_json()
    _print_divergence(session, found, row)
    session.finish({"evaluation": "divergence", "text": options["text"]} | row_of(read) | row)


def _print_divergence(session: Session, found: Divergence, row: dict[str, Any]) -> None:
    error = "" if found.mean_error is None else f" ± {found.mean_error:.5f}"
    session.console.print(
        f"KL {found.mean:.5f}{error} nats a token; median {row['kl_median']:.5f}, 99% {row['kl_p99']:.4f}, "
        f"99.9% {row['kl_p999']:.4f}, largest {row['kl_max']:.3f}; "
        f"the same most likely token at {found.top1:.2%} of {found.quantized.tokens} positions"
    )
    table = Table("KL", "before", "next", "baseline expected", "quantized expects", title="worst tokens")
    for each in found.worst[:8]:
        expected = (f"{each[name]['token']!r} {each[name]['chance']:.0%}" for name in ("baseline", "quantized"))
        table.add_row(f"{each['kl']:.2f}", *map(Text, (repr(each["before"][-48:]), repr(each["next"]), *expected)))
    session.console.print(table)


@evaluate.command()
@session_options
@click.option("--tasks", "names", required=True, help="Names, patterns or YAML files, with commas.")
@click.option("--include", type=click.Path(path_type=Path), help="Directory with task files of yours.")
@click.option("--fewshot", type=click.IntRange(min=0), help="Examples before a question.  [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task.  [default: all]")
@click.option("--allow-code", is_flag=True, help="Yes, run the Python that task files of mine bring.")
def tasks(
    names: str, include: Path | None, fewshot: int | None, limit: int | None, allow_code: bool, **options: Any
) -> None:
    """Tasks of lm-evaluation-harness; the last line is JSON."""
    session = make_session(options)
    known = TaskList([name.strip() for name in names.split(",") if name.strip()], include, allow_code)
    found: list[list[dict[str, Any]]] = []
    for name in session.models():
        backend = session.open(session.source(name))
        with session.progress(backend) as on_step:
            rows = run_tasks(backend, known, fewshot, limit, session.library, on_step)
        found.append([{"evaluation": "task", "model": name, "backend": backend.name} | row for row in rows])
    _print_tasks(session, found)
    rows = found[0]
    if len(found) == 2:
        rows = [row | {"baseline": other} for row, other in zip(*found, strict=True)]
    session.finish({"evaluation": "tasks", "rows": rows}, rows)


def _print_tasks(session: Session, found: list[list[dict[str, Any]]]) -> None:
    table = Table("task", "metric", "examples", *session.models())
    for same in zip(*found, strict=True):
        values = [f"{row['value']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] else "") for row in same]
        table.add_row(same[0]["task"], same[0]["metric"], str(same[0]["examples"]), *values)
    session.console.print(table)


@evaluate.command()
@session_options
@click.option("--prompts", type=click.Path(path_type=Path), help=".txt, one a line; or .jsonl of prompt or messages.")
@click.option("--prompt", multiple=True, help=f"A prompt; may be given again.  [default: {PROMPT}]")
@click.option("--tokens", type=click.IntRange(min=1), default=40, show_default=True, help="Tokens to write.")
def generate(prompts: Path | None, prompt: tuple[str, ...], tokens: int, **options: Any) -> None:
    """What CHECKPOINT writes, greedily, beside what the baseline does; the last line is JSON."""
    session = make_session(options)
    asked = [Prompt(text) for text in prompt] + (read_prompts(prompts) if prompts else [])
    asked = asked or [Prompt(PROMPT)]
    sources = [session.source(name) for name in session.models()]
    written = []
    for source in sources:
        backend = session.open(source)
        with session.progress(backend) as on_step:
            written.append(continuations(backend, asked, tokens, session.library, on_step))
    tokenizers = [source.tokenizer() for source in sources]
    rows = [side_by_side(each, [texts[i] for texts in written], tokenizers) for i, each in enumerate(asked)]
    for row in rows:
        session.console.print(Text(row["prompt"], style="bold"))
        for name, text in zip(session.models(), row["texts"], strict=True):
            session.console.print(Text(f"  {name}: {' '.join(text.split())}"))
    row = {"evaluation": "generate", "model": session.checkpoint, "tokens": tokens, "rows": rows}
    if session.baseline:
        equal = sum(each["equal"] for each in rows)
        session.console.print(f"{equal} of {len(rows)} continuations are the same")
        row |= {"baseline": {"model": session.baseline}, "equal": equal, "prompts": len(rows)}
    session.finish(row)


@evaluate.command()
@session_options
@click.option("--problems", type=click.Path(path_type=Path), required=True, help=".jsonl in HumanEval's layout.")
@click.option("--allow-code", is_flag=True, help="Yes, run here what the model writes.")
@click.option("--tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of an answer.")
@click.option("--seconds", type=click.IntRange(min=1), default=10, show_default=True, help="Of a program's life.")
@click.option("--memory", type=Size(), default="1GB", show_default=True, help="Of a program.")
@click.option("--limit", type=click.IntRange(min=1), help="Problems.  [default: all]")
def code(
    problems: Path, allow_code: bool, tokens: int, seconds: int, memory: int, limit: int | None, **options: Any
) -> None:
    """pass@1 on programming problems; the last line is JSON."""
    if not allow_code:
        raise UsageError(
            "this runs programs that a model writes, behind walls (SECURITY.md says what they hold); pass --allow-code "
            "if you want that"
        )
    session = make_session(options)
    known = read_problems(problems)[:limit]
    session.console.print(f"programs run behind {', '.join(require_containment())}")
    found = []
    for name in session.models():
        backend = session.open(session.source(name))
        with session.progress(backend) as on_step:
            rows = solve(backend, known, tokens, Limits(seconds, memory), session.library, on_step)
        found.append({"model": name, "pass_at_1": round(pass_at_1(rows), 6), "rows": rows})
        passed = sum(row["passed"] for row in rows)
        session.console.print(f"{name}: pass@1 {found[-1]['pass_at_1']:.4f}, {passed} of {len(rows)} problems")
        for row in [row for row in rows if not row["passed"]][:8]:
            session.console.print(Text(f"  {row['task_id']}: {row['reason']}"))
    digest = hashlib.sha256(json.dumps([vars(problem) for problem in known]).encode()).hexdigest()
    row = {"evaluation": "code", "problems": str(problems), "problems_sha256": digest} | found[0]
    if len(found) == 2:
        row["baseline"] = found[1]
    session.finish(row)


def _line(score: Score) -> str:
    return (
        f"{score.model}: perplexity {score.perplexity:.4f} (loss {score.nll:.5f}) on {score.tokens} tokens, "
        f"{len(score.window_nll)} windows of {score.context}; {score.protocol}; {score.backend}"
    )
