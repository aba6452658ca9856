"""`quantize-generate`: continue a text, or chat, with a checkpoint."""

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click

from lowbit import engine
from lowbit.commands.common import (
    CACHE,
    CONTEXT,
    DENSE_HEAD,
    DEVICE,
    REVISION,
    run_command,
    say,
    say_loaded,
)
from lowbit.commands.drafters import DRAFTER, DRAFTER_OPTIONAL, DRAFTER_SCHEME, drafter_of
from lowbit.commands.parts import FIRST, Parts, by_part, flag, frame, value
from lowbit.engine.engine import Engine
from lowbit.engine.sampling import Completion, Sampling
from lowbit.errors import EngineError
from lowbit.models.devices import check_device
from lowbit.serve.session import Session


def main() -> None:
    """Entry point of the console script."""
    run_command(generate)


PARTS: Parts = {
    FIRST: (
        click.option(
            "--prompt",
            "-p",
            multiple=True,
            help="Continue this text, or - for standard input; may be given again.  [default: none, with --chat]",
        ),
        flag("--chat", text="Answer the prompt as a user's message; without one, start a conversation."),
        click.option("--system", help="Begin a chat with this system message.  [default: none]"),
        flag("--stream", text="Print the text of one prompt as it is written."),
        value(
            "--max-new-tokens",
            "--max-tokens",
            type=int,
            default=128,
            text="Write at most this many tokens.",
        ),
    ),
    "Sampling": (
        value("--temperature", type=float, default=0.0, text="Sample at this temperature; 0 is greedy."),
        value("--top-k", type=int, default=0, text="Sample from the k likeliest tokens; 0 is all."),
        value(
            "--top-p",
            type=float,
            default=1.0,
            text="Sample from the smallest set of tokens with total probability p.",
        ),
        value(
            "--min-p",
            type=float,
            default=0.0,
            text="Drop tokens with less than p times the probability of the likeliest.",
        ),
        value(
            "--repetition-penalty",
            type=float,
            default=1.0,
            text="Divide the logits of tokens seen by this; 1 is none.",
        ),
        value(
            "--presence-penalty",
            type=float,
            default=0.0,
            text="Subtract this from the logit of every generated token.",
        ),
        value(
            "--frequency-penalty",
            type=float,
            default=0.0,
            text="Subtract this from the logit of a token once for each occurrence.",
        ),
        click.option(
            "--seed", type=int, help="Seed all random choices with this number.  [default: another each time]"
        ),
    ),
    "End of the text": (
        click.option("--stop", multiple=True, help="Stop at this string; may be given again.  [default: none]"),
        value(
            "--min-new-tokens",
            "--min-tokens",
            type=int,
            default=0,
            text="Ignore stop tokens and strings before this many tokens.",
        ),
        flag("--ignore-eos", text="Write on after the model's own stop tokens."),
        click.option(
            "--bad-word",
            "bad_words",
            multiple=True,
            help="Avoid this word, alone or after a space; longer words that contain it stay possible; may be given "
            "again.  [default: none]",
        ),
    ),
    "Search": (
        value("--beams", type=int, default=1, text="Search with this many beams; 1 is none."),
        value(
            "--length-penalty",
            type=float,
            default=1.0,
            text="Divide a beam's score by its length to this power.",
        ),
        value(
            "--lookup",
            type=int,
            default=0,
            text="Draft up to this many tokens a step from the text so far; at most 7.",
        ),
        DRAFTER,
        DRAFTER_SCHEME,
        DRAFTER_OPTIONAL,
    ),
    "Engine": (DEVICE, CONTEXT, CACHE, DENSE_HEAD, REVISION),
    "Output on the screen": (flag("--verbose", "-v", text="Print details as well: token and step counts, on stderr."),),
}


@click.command(
    **frame(
        'lowbit generate demo-awq "The capital of France is" --max-new-tokens 20',
        "lowbit generate demo-awq --chat",
        'echo "def fibonacci(n):" | lowbit generate demo-awq --prompt - --stream',
    )
)
@click.argument("checkpoint")
@click.argument("text", required=False)
@by_part(PARTS)
def generate(
    checkpoint: str,
    text: str | None,
    prompt: tuple[str, ...],
    chat: bool,
    system: str | None,
    stream: bool,
    device: str,
    context: int | None,
    cache: str,
    head: str,
    drafter: str | None,
    drafter_scheme: str,
    drafter_optional: bool,
    revision: str | None,
    verbose: bool,
    **settings: Any,
) -> None:
    """Continue TEXT, or chat, with CHECKPOINT (a directory, demo, or a hub id)."""
    try:
        sampling = Sampling(**settings)
        prompts = [sys.stdin.read() if each == "-" else each for each in (*filter(None, [text]), *prompt)]
        if stream and len(prompts) > 1:
            raise EngineError(f"--stream prints one text as it is written; {len(prompts)} prompts were given")
        if not prompts and not chat:
            raise EngineError("no text to continue: lowbit generate CHECKPOINT TEXT, or --chat for a conversation")
        drafts = drafter_of(drafter, drafter_scheme, drafter_optional)
        model = engine.load(checkpoint, check_device(device), None, context, cache, head, revision, drafts)
        say_loaded(model.decoder.weights.expanded, model.decoder.weights.unused_cache)
        if not prompts:
            converse(model, sampling, system)
        elif stream:
            given = ask(model, prompts[0], system) if chat else prompts[0]
            show(piece.text for piece in model.stream([given], sampling))
        else:
            inputs = [ask(model, each, system) if chat else each for each in prompts]
            for each, completion in zip(prompts, model.generate(inputs, sampling), strict=True):
                say(completion.text if chat else each + completion.text)
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
    """Token and step counts, the reason for the end, and the drafts that were right."""
    count = len(completion.tokens)
    shares = ", ".join(f"{right} of {checked}" for checked, right in completion.drafts)
    return (
        f"{completion.prompt_tokens} tokens read, {count} written in {completion.steps} steps "
        f"({completion.finish_reason}), seed {completion.seed}" + f"; drafts right by place: {shares}" * bool(shares)
    )
