"""Answers in the protocol's form: whole, or as the chunks of a stream."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit.engine.sampling import TokenLogprob
from lowbit.serve.dialects import Reader
from lowbit.serve.job import Job, Update
from lowbit.serve.problems import Problem
from lowbit.serve.vocabulary import Vocabulary

Delta = dict[str, Any]


@dataclass
class Choice:
    """One choice: the parts of its message so far.

    prompt    number of the prompt that it continues
    echo      the prompt's text, if the answer begins with it; `echoed` its tokens and their log-probabilities
    silent    True if nothing is to be written
    """

    index: int
    prompt: int
    reader: Reader
    echo: str | None = None
    silent: bool = False
    echoed: list[TokenLogprob | int] = field(default_factory=list)
    message: Delta = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    written: int = 0
    thought: int = 0
    read: int = 0
    cached: int = 0
    reason: str | None = None

    def begin(self, job: Job) -> None:
        """Take what is known once the prompt is read."""
        request = job.request
        self.read, self.cached = len(request.prompt), job.reused
        if self.echo is not None:
            self.echoed = [request.prompt[0], *(request.prompt_logprobs or ())]

    def take(self, update: Update) -> list[Delta]:
        """The changes that an update makes to the message."""
        piece, ended = update.piece, update.piece.finish_reason
        if self.silent:
            self.reason = ended
            return []
        self.written += len(piece.tokens)
        self.thought += len(piece.tokens) if self.reader.thinking else 0
        self.logprobs += update.logprobs
        deltas = list(self.reader.feed(piece.text, ended is not None))
        for delta in deltas:
            merge(self.message, delta)
        if ended:
            self.reason = self.reader.finish(ended)
        return deltas


def merge(message: Delta, delta: Delta) -> None:
    """Add a change to a message: texts grow, calls follow one another."""
    for name, value in delta.items():
        if name == "tool_calls":
            message.setdefault(name, []).extend({k: v for k, v in call.items() if k != "index"} for call in value)
        else:
            message[name] = message.get(name, "") + value


class Answer(ABC):
    """The frame of an answer, the same for all its chunks.

    kind, part_kind  the protocol's names of an answer and of a chunk
    last             the end of a stream
    """

    kind, part_kind, prefix, last = "", "", "", "data: [DONE]\n\n"

    def __init__(self, model: str, vocabulary: Vocabulary, wants_logprobs: bool) -> None:
        self.model, self.vocabulary, self.wants_logprobs = model, vocabulary, wants_logprobs
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def event(self, data: Delta) -> str:
        """One server-sent event."""
        return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def waiting(self) -> str:
        """A sign of life in a stream without chunks: a comment, which clients skip."""
        return ": the request waits, or its prompt is read\n\n"

    def failure(self, problem: Problem) -> Delta:
        """The event of an error within a stream."""
        return problem.body()

    def ending(self, choices: Iterable[Choice], wants_usage: bool) -> list[Delta]:
        """The chunks after the last text: the usage if it is wanted."""
        return [self.frame(self.part_kind, [], usage(choices))] if wants_usage else []

    def frame(self, kind: str, choices: list[Delta], usage: Delta | None = None) -> Delta:
        """An answer or a chunk with these choices."""
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return found if usage is None else found | {"usage": usage}

    def whole(self, choices: Iterable[Choice]) -> Delta:
        """The whole answer."""
        ordered = sorted(choices, key=lambda choice: choice.index)
        return self.frame(self.kind, [self.finished(choice) for choice in ordered], usage(ordered))

    def opening(self, choice: Choice) -> list[Delta]:
        """The chunks before a choice's first text."""
        return []

    @abstractmethod
    def chunks(self, choice: Choice, deltas: list[Delta], update: Update) -> list[Delta]:
        """The chunks of one update."""

    @abstractmethod
    def finished(self, choice: Choice) -> Delta:
        """A finished choice."""


class ChatAnswer(Answer):
    """An answer of chat completions."""

    kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def logprobs(self, found: Sequence[TokenLogprob]) -> Delta | None:
        """Log-probabilities in the form of chat completions, if they are wanted."""
        return self.vocabulary.in_chat(found) if self.wants_logprobs else None

    def chunk(self, index: int, delta: Delta, logprobs: Delta | None = None, reason: str | None = None) -> Delta:
        """One chunk with one choice."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.frame(self.part_kind, [choice])

    def opening(self, choice: Choice) -> list[Delta]:
        return [self.chunk(choice.index, {"role": "assistant", "content": ""})]

    def chunks(self, choice: Choice, deltas: list[Delta], update: Update) -> list[Delta]:
        logprobs = self.logprobs(update.logprobs)
        if not deltas and self.wants_logprobs:
            deltas = [{"content": ""}]
        found = [self.chunk(choice.index, delta, None if at else logprobs) for at, delta in enumerate(deltas)]
        return found if choice.reason is None else [*found, self.chunk(choice.index, {}, None, choice.reason)]

    def finished(self, choice: Choice) -> Delta:
        message = {"role": "assistant", "content": None if "tool_calls" in choice.message else ""} | choice.message
        logprobs = self.logprobs(choice.logprobs)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}


class TextAnswer(Answer):
    """An answer of completions."""

    kind, part_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, vocabulary: Vocabulary, wants_logprobs: bool) -> None:
        super().__init__(model, vocabulary, wants_logprobs)
        self.offsets: dict[int, int] = {}

    def part(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob | int]) -> Delta:
        """The next part of a choice."""
        found = None
        if self.wants_logprobs:
            found = self.vocabulary.in_text(logprobs, self.offsets.get(choice.index, 0))
            self.offsets[choice.index] = self.offsets.get(choice.index, 0) + sum(map(len, found["tokens"]))
        return {"index": choice.index, "text": text, "logprobs": found, "finish_reason": choice.reason}

    def opening(self, choice: Choice) -> list[Delta]:
        if choice.echo is None:
            return []
        return [self.frame(self.kind, [self.part(choice, choice.echo, choice.echoed) | {"finish_reason": None}])]

    def chunks(self, choice: Choice, deltas: list[Delta], update: Update) -> list[Delta]:
        text = "".join(delta["content"] for delta in deltas)
        logprobs = () if choice.silent else update.logprobs
        if text or choice.reason or logprobs:
            return [self.frame(self.kind, [self.part(choice, text, logprobs)])]
        return []

    def finished(self, choice: Choice) -> Delta:
        text = (choice.echo or "") + choice.message.get("content", "")
        return self.part(choice, text, [*choice.echoed, *choice.logprobs])


def usage(choices: Iterable[Choice]) -> Delta:
    """Token counts of an answer. Choices of one prompt count it once."""
    choices = list(choices)
    prompts = {choice.prompt: choice for choice in reversed(choices)}
    read, written = (sum(counts) for counts in ([each.read for each in prompts.values()], [c.written for c in choices]))
    thought = sum(choice.thought for choice in choices)
    more = {"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}
    return more | {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached for each in prompts.values())},
    }
