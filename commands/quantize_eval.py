"""`quantize-eval`: what a checkpoint lost."""

import json
from pathlib import Path
from typing import Any

import click

from calibrate.data import builtin_text
from commands.common import SETTINGS, check_device, make_console, run_command
from evaluation.perplexity import Score, describe_difference, difference
from evaluation.perplexity import perplexity as score_text
from evaluation.sample import PROMPT, continuation
from export.errors import CheckpointError
from models.source import open_source
from quant import __version__


def main() -> None:
    """Entry point of the console script."""
    run_command(evaluate)


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="lowbit")
def evaluate() -> None:
    """Measure a checkpoint, unquantized or quantized."""


@evaluate.command()
@click.argument("checkpoint")
@click.option("--baseline", help="Model to compare with: directory, hub id, or demo.")
@click.option(
    "--text", default="builtin", show_default=True, help="UTF-8 file, or builtin: held-out Python documentation."
)
@click.option(
    "--context",
    "--length",
    "--seqlen",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens a window.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    help="Score only the first so many.  [default: 16 of builtin, all of a file]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
def perplexity(
    checkpoint: str,
    baseline: str | None,
    text: str,
    context: int,
    windows: int | None,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Perplexity of CHECKPOINT on a text; the last line is JSON."""
    console = make_console()
    content = _text(text)
    count = windows or (16 if text == "builtin" else None)

    def score(name: str) -> Score:
        with console.status(f"{name}") as status:
            source = open_source(name, trust_remote_code)
            return score_text(
                source,
                content,
                context,
                count,
                check_device(device),
                lambda done, total: status.update(f"{name}: block {done}/{total}"),
            )

    result = score(checkpoint)
    row: dict[str, Any] = result.as_json() | {"text": text}
    console.print(_line(result))
    if baseline:
        other = score(baseline)
        _require_same_tokens(result, other)
        delta, error = difference(result, other)
        console.print(_line(other))
        change = describe_difference(other, result)
        console.print(f"loss {change} nats per token (paired over {len(result.window_nll)} windows)")
        row |= {
            "baseline": other.as_json(),
            "delta_nll": round(delta, 6),
            "delta_nll_se": None if error is None else round(error, 6),
        }
    click.echo(json.dumps(row))


@evaluate.command()
@click.argument("checkpoint")
@click.option("--baseline", help="Model to compare with: directory, hub id, or demo.")
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=40, show_default=True, help="Tokens to write.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
def sample(
    checkpoint: str, baseline: str | None, prompt: str, tokens: int, device: str, trust_remote_code: bool
) -> None:
    """A line that CHECKPOINT writes, greedily; and the baseline's."""
    for name in [checkpoint] + ([baseline] if baseline else []):
        source = open_source(name, trust_remote_code)
        click.echo(f"{name}: {prompt}|{continuation(source, prompt, tokens, check_device(device))}")


def _text(text: str) -> str:
    if text == "builtin":
        return builtin_text("heldout")
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--text {text}: {error}; name a UTF-8 file, or builtin") from error


def _line(score: Score) -> str:
    return (
        f"{score.model}: perplexity {score.perplexity:.4f} (loss {score.nll:.5f}) on {score.tokens} tokens, "
        f"{len(score.window_nll)} windows of {score.context}"
    )


def _require_same_tokens(score: Score, other: Score) -> None:
    if score.ids_sha256 != other.ids_sha256:
        raise CheckpointError(
            f"{score.model} and {other.model} cut the text into different tokens: their losses cannot be compared; "
            "name the model that the checkpoint was made from"
        )
