"""Greedy continuations by both models for the same prompts: a quick check that the quantized one still makes sense."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, DatasetError
from lowbit.evaluation.backend import LONGEST_CONTEXT, Backend
from lowbit.evaluation.journal import Library
from lowbit.evaluation.perplexity import OnStep, silent
from lowbit.export.files import read_text
from lowbit.export.plain import parse_json
from lowbit.models.chat import render_chat

PROMPTS = ("The capital of France is", "Three reasons to learn to swim are", "def fibonacci(n):")
TOKENS = 40


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or the messages of a chat."""

    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids of the prompt; chats go through the chat template."""
        if self.text is not None:
            return list(tokenizer(self.text).input_ids)
        if not tokenizer.chat_template:
            raise CheckpointError("a prompt has messages, but the model's tokenizer has no chat template; pass text")
        text = render_chat(tokenizer, self.messages or (), add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def as_text(self) -> str:
        """The prompt for reports: the text, or the chat's last message."""
        return self.text if self.text is not None else (self.messages or ({"content": ""},))[-1]["content"]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in a .txt file (one per line) or a .jsonl file (objects with `prompt`, or with chat `messages`).

    DatasetError with the line for any other layout.
    """
    try:
        lines = read_text(path).splitlines()
    except (FileNotFoundError, CheckpointError) as error:
        raise DatasetError(f"{error}; prompts are a UTF-8 .txt or .jsonl file") from error
    if path.suffix not in (".txt", ".jsonl"):
        raise DatasetError(f"{path}: prompts are a .txt file (one a line) or a .jsonl file, not {path.suffix!r}")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DatasetError(f"{path}: no prompt in it")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in numbered]
    return [_parsed(f"{path}:{number}", line) for number, line in numbered]


def _parsed(where: str, line: str) -> Prompt:
    try:
        row = parse_json(line.encode("utf-8", "surrogatepass"), where)
    except CheckpointError as error:
        raise DatasetError(str(error)) from error
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"]:
        return Prompt(row["prompt"])
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Prompt(messages=tuple({"role": m["role"], "content": m["content"]} for m in messages))
    found = f"an object with {', '.join(row) or 'nothing'}" if isinstance(row, dict) else type(row).__name__
    raise DatasetError(
        f'{where}: {found}; write {{"prompt": "..."}} or {{"messages": [{{"role": "user", "content": "..."}}]}}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def continuations(
    backend: Backend, prompts: Sequence[Prompt], tokens: int, library: Library | None = None, on_step: OnStep = silent
) -> list[list[int]]:
    """The greedy continuation of each prompt, at most `tokens` ids.

    library  cache of finished prompts

    CheckpointError if a prompt fills the model's positions, or LONGEST_CONTEXT if config.json names no number of them.
    """
    ids = [prompt.ids(backend.source.tokenizer()) for prompt in prompts]
    known = backend.source.positions
    positions = LONGEST_CONTEXT if known is None else known
    said = f"has positions for {positions}" if known else f"names no number of positions, {positions} are the most"
    for number, prompt in enumerate(ids, 1):
        if len(prompt) >= positions:
            raise CheckpointError(
                f"prompt {number} has {len(prompt)} tokens: {backend.source.name} {said}, prompt and answer "
                "together; shorten it"
            )
    journal = (library or Library()).journal("generate", [backend], prompts=ids, tokens=tokens)
    for index, prompt in enumerate(ids):
        on_step(index, len(ids))
        if index not in journal.rows:
            journal.add(index, {"ids": backend.generate(prompt, tokens)})
    on_step(len(ids), len(ids))
    return [journal.rows[index]["ids"] for index in range(len(ids))]


def texts_row(
    prompts: Sequence[Prompt], written: Sequence[Sequence[list[int]]], tokenizers: Sequence[Any], tokens: int
) -> dict[str, Any]:
    """The row of all prompts; with two models also the number of equal continuations.

    written  for each model, the continuation of each prompt
    """
    rows = [side_by_side(each, [texts[i] for texts in written], tokenizers) for i, each in enumerate(prompts)]
    row = {"evaluation": "generate", "tokens": tokens, "rows": rows}
    return row if len(written) < 2 else row | {"equal": sum(each["equal"] for each in rows), "prompts": len(rows)}


def side_by_side(prompt: Prompt, written: list[list[int]], tokenizers: Sequence[Any]) -> dict[str, Any]:
    """One prompt's row: each model's text and, for two models, the length of their common beginning.

    agreed  tokens before the first difference; `common` is their text
    """
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True) for tokenizer, ids in zip(tokenizers, written, strict=True)
    ]
    row: dict[str, Any] = {"prompt": prompt.as_text(), "texts": texts}
    if len(written) < 2:
        return row
    ours, theirs = written
    agreed = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    common = tokenizers[0].decode(ours[:agreed], skip_special_tokens=True)
    return row | {"agreed": agreed, "equal": ours == theirs, "common": common}
