"""`quantize-generate`: continue a text, or chat, with a checkpoint."""

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click

from lowbit import __version__, engine
from lowbit.commands.common import REVISION, run_command, say, say_expanded
from lowbit.commands.parts import SETTINGS
from lowbit.engine.engine import Engine
from lowbit.engine.sampling import Completion, Sampling
from lowbit.errors import EngineError
from lowbit.models.devices import check_device
from lowbit.serve.session import Session


def main() -> None:
    """Entry point of the console script."""
    run_command(generate)


@click.command(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="lowbit")
@click.argument("checkpoint")
@click.option("--prompt", "-p", multiple=True, help="Text to continue; may be given several times. '-' reads stdin.")
@click.option("--chat", is_flag=True, help="The prompt is a user message; without a prompt, start a conversation.")
@click.option("--system", help="System message, for --chat.")
@click.option("--stream", is_flag=True, help="Print text as it is written (one prompt).")
@click.option("--max-new-tokens", "--max-tokens", type=int, default=128, show_default=True, help="Tokens to write.")
@click.option("--min-new-tokens", "--min-tokens", type=int, default=0, help="Ignore stop tokens and strings before.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy decoding.")
@click.option("--top-k", type=int, default=0, help="Sample from the k likeliest tokens; 0 for all.")
@click.option("--top-p", type=float, default=1.0, help="Sample from the smallest set with total probability p.")
@click.option(
    "--min-p", type=float, default=0.0, help="Drop tokens with less than p times the probability of the likeliest."
)
@click.option("--repetition-penalty", type=float, default=1.0, help="Divides the logits of tokens seen; 1 for none.")
@click.option("--presence-penalty", type=float, default=0.0, help="Subtracted from the logit of every generated token.")
@click.option("--frequency-penalty", type=float, default=0.0, help="Subtracted once for each occurrence.")
@click.option("--stop", multiple=True, help="String that ends the text; may be given several times.")
@click.option(
    "--bad-word",
    "bad_words",
    multiple=True,
    help="Word to avoid, alone or after a space; longer words that contain it stay possible.",
)
@click.option("--ignore-eos", is_flag=True, help="Do not stop at the model's own stop tokens.")
@click.option("--seed", type=int, help="Same seed, same text.")
@click.option("--beams", type=int, default=1, help="Beams of beam search; 1 for none.")
@click.option("--length-penalty", type=float, default=1.0, help="Exponent of the length, for --beams.")
@click.option("--lookup", type=int, default=0, help="Draft tokens per step for prompt-lookup decoding; at most 7.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--context", type=int, help="Longest sequence, prompt and output.  [default: 4096, or the model's]")
@click.option("--cache", type=click.Choice(["same", "int8"]), default="same", help="Type of keys and values.")
@click.option("--head", default="dense", help="Scheme of the output head: dense or int8.")
@REVISION
@click.option("--verbose", "-v", is_flag=True, help="Print token and step counts on stderr.")
def generate(
    checkpoint: str,
    prompt: tuple[str, ...],
    chat: bool,
    system: str | None,
    stream: bool,
    device: str,
    context: int | None,
    cache: str,
    head: str,
    revision: str | None,
    verbose: bool,
    **settings: Any,
) -> None:
    """Continue a text, or chat, with CHECKPOINT (a directory, demo, or a hub id)."""
    try:
        sampling = Sampling(**settings)
        prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
        if stream and len(prompts) > 1:
            raise EngineError(f"--stream prints one text as it is written; {len(prompts)} prompts were given")
        if not prompts and not chat:
            raise EngineError("no prompt: pass --prompt TEXT, or --chat for a conversation")
        model = engine.load(checkpoint, check_device(device), None, context, cache, head, revision)
        say_expanded(model.decoder.weights.expanded)
        if not prompts:
            converse(model, sampling, system)
        elif stream:
            given = ask(model, prompts[0], system) if chat else prompts[0]
            show(piece.text for piece in model.stream([given], sampling))
        else:
            inputs = [ask(model, text, system) if chat else text for text in prompts]
            for text, completion in zip(prompts, model.generate(inputs, sampling), strict=True):
                say(completion.text if chat else text + completion.text)
                if verbose:
                    say(describe(completion), err=True)
    except EngineError as error:
        raise click.UsageError(str(error)) from error


def ask(model: Engine, text: str, system: str | None) -> list[int]:
    """Token ids of one user message in the model's chat template."""
    return model.encode_chat([*opening(system), {"role": "user", "content": text}])


def opening(system: str | None) -> list[dict[str, str]]:
    """The system message as a list; empty without one."""
    return [] if system is None else [{"role": "system", "content": system}]


def show(texts: Iterator[str]) -> str:
    """Print a continuation as it is written, and return it. Ctrl-C ends it early."""
    written: list[str] = []
    try:
        for text in texts:
            written.append(text)
            say(text, nl=False)
    except KeyboardInterrupt:
        say(" [interrupted]", nl=False, err=True)
    say()
    return "".join(written)


def converse(model: Engine, sampling: Sampling, system: str | None) -> None:
    """Chat on the terminal until an empty line or the end of the input. A turn computes its new tokens alone."""
    messages = opening(system)
    say("An empty line ends the conversation; Ctrl-C ends an answer.", err=True)
    with Session(model, sequences=1) as session:
        while question := click.prompt(">", default="", show_default=False, prompt_suffix=" ", err=True).strip():
            messages.append({"role": "user", "content": question})
            with closing(session.stream(model.encode_chat(messages), sampling)) as pieces:
                answer = show(piece.text for piece in pieces)
            messages.append({"role": "assistant", "content": answer})


def describe(completion: Completion) -> str:
    """Token and step counts, and the reason for the end."""
    count = len(completion.tokens)
    return (
        f"{completion.prompt_tokens} tokens read, {count} written in {completion.steps} steps "
        f"({completion.finish_reason}), seed {completion.seed}"
    )
