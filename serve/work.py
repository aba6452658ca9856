"""From a checked body to an answer: requests of the engine, their updates, chunks or a whole answer."""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit.engine.engine import Engine
from lowbit.engine.request import Request
from lowbit.engine.sampling import Sampling
from lowbit.errors import EngineError
from lowbit.serve.answers import Answer, ChatAnswer, Choice, Delta, TextAnswer, usage
from lowbit.serve.dialects import Dialect, Reader, dialect_of, hidden_tokens, reasoning_of
from lowbit.serve.flow import Flow
from lowbit.serve.grammar import Grammar, call_grammar, grammar_of
from lowbit.serve.job import Job, Update
from lowbit.serve.metrics import Metrics
from lowbit.serve.problems import SHOWN, Problem, problem_of
from lowbit.serve.protocol import ChatBody, Settings, TextBody, offered
from lowbit.serve.session import Session
from lowbit.serve.vocabulary import Vocabulary, decoded

LOG = logging.getLogger("lowbit.serve")
TAIL = 8  # tokens of a prompt that show if it begins the reasoning
SHORT_TEXT = 16  # tokens of a completion without max_tokens, as the protocol has it


@dataclass(frozen=True)
class Server:
    """Everything that requests share.

    name      of the model, as clients call it
    defaults  settings of requests that leave them out
    """

    session: Session
    name: str
    defaults: Sampling
    vocabulary: Vocabulary
    metrics: Metrics

    @property
    def engine(self) -> Engine:
        """The engine of the session."""
        return self.session.engine

    def template(self) -> str:
        """The source of the model's chat template; empty without one."""
        found = self.engine.tokenizer and self.engine.tokenizer.chat_template
        return found if isinstance(found, str) else "".join(map(str, (found or {}).values()))

    def require_model(self, name: str | None) -> None:
        """Problem for a model that is not served."""
        if name is not None and name != self.name:
            asked = name[:SHOWN]
            raise Problem(404, f"model {asked!r} is not served here; {self.name!r} is", "model", "model_not_found")


@dataclass(frozen=True)
class Work:
    """One body's requests, choices and the frame of its answer."""

    requests: list[Request]
    choices: list[Choice]
    answer: Answer
    body: Settings
    grammar: Grammar | None = None


def sampling_of(server: Server, body: Settings, most: int | None, logprobs: int | None, echo: bool = False) -> Sampling:
    """The sampling of a body. EngineError for settings out of range."""
    room = server.engine.options.context
    changes = body.sampling() | {"max_new_tokens": max(room if most is None else most, 1), "logprobs": logprobs}
    return replace(server.defaults, **changes, prompt_logprobs=echo and logprobs is not None)


def seeded(sampling: Sampling, index: int) -> Sampling:
    """The sampling of one of several choices: each has a seed of its own."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)


def requests_of(server: Server, prompts: Sequence[str | Sequence[int]], sampling: Sampling, n: int) -> list[Request]:
    """A request for each choice of each prompt, in order. Busy before any is made if the queue has no room."""
    engine = server.engine
    server.session.require_room(len(prompts) * n)
    tokens = [engine.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    places = [(prompt, choice) for prompt in tokens for choice in range(n)]
    return [engine.request(at, prompt, seeded(sampling, choice)) for at, (prompt, choice) in enumerate(places)]


def text_work(server: Server, body: TextBody) -> Work:
    """The work of a completion."""
    server.require_model(body.model)
    grammar = grammar_of(server.vocabulary, body)
    most = SHORT_TEXT if body.max_tokens is None else body.max_tokens
    sampling = sampling_of(server, body, most, body.logprobs, body.echo)
    requests = requests_of(server, prompts_of(body), sampling, body.n)
    choices = [
        Choice(at, at // body.n, Reader(), echo_of(server, body, request.prompt), most == 0)
        for at, request in enumerate(requests)
    ]
    return Work(requests, choices, TextAnswer(server.name, server.vocabulary, body.logprobs is not None), body, grammar)


def prompts_of(body: TextBody) -> list[str | Sequence[int]]:
    """The prompts of a completion: one or several, as text or tokens."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return list(prompt) if several else [prompt]


def echo_of(server: Server, body: TextBody, prompt: Sequence[int]) -> str | None:
    """The prompt's text, if the answer is to begin with it."""
    return decoded(server.engine.require_tokenizer(), prompt) if body.echo else None


def chat_work(server: Server, body: ChatBody) -> Work:
    """The work of a chat completion."""
    server.require_model(body.model)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs: true", "top_logprobs")
    sampling = sampling_of(server, body, most, (body.top_logprobs or 0) if body.logprobs else None)
    template, tools = server.template(), offered(body)
    dialect = dialect_of(template) if tools else None
    if tools and dialect is None:
        raise Problem(400, "the model's chat template has no form of tool calls that is known here", "tools")
    messages = [message.plain() for message in body.messages]
    prompt = server.engine.encode_chat(messages, tools or None, body.variables())
    requests = requests_of(server, [prompt], sampling, body.n)
    marks = reasoning_of(template)
    thinking = marks is not None and text_before(server, prompt).endswith(marks[0])
    for request in requests:
        request.stream.hidden = shown_marks(server, dialect, marks)
    grammar = grammar_of(server.vocabulary, body) or call_grammar(server.vocabulary, dialect, body)
    choices = [Choice(at, 0, Reader(dialect, marks, thinking), None, most == 0) for at in range(len(requests))]
    return Work(requests, choices, ChatAnswer(server.name, server.vocabulary, body.logprobs), body, grammar)


def text_before(server: Server, prompt: Sequence[int]) -> str:
    """The end of a prompt as text."""
    return decoded(server.engine.require_tokenizer(), prompt[-TAIL:]).rstrip()


def shown_marks(server: Server, dialect: Dialect | None, marks: tuple[str, str] | None) -> frozenset[int] | None:
    """The tokens that a text leaves out, if some of the marks are special tokens; else None."""
    shown = (*(marks or ()), *(() if dialect is None else (dialect.begin, dialect.end, "[ARGS]")))
    return hidden_tokens(server.engine.require_tokenizer(), shown) if shown else None


class Run:
    """Work in the batch."""

    def __init__(self, server: Server, work: Work, client: str) -> None:
        self.server, self.work = server, work
        self.times = [time.perf_counter()] * len(work.choices)
        grammars = [None if work.grammar is None else work.grammar.copy() for _ in work.requests]
        self.flow = Flow(server.session, work.requests, client, grammars)
        self.updates = self.flow.updates()

    async def first(self) -> list[Delta]:
        """The chunks of the first update; none if it takes long. An error before it is still an HTTP status."""
        return self.take(await anext(self.updates))

    async def whole(self) -> Delta:
        """The whole answer."""
        async for arrived in self.updates:
            if arrived is not None:
                self.advance(*arrived)
        self.log()
        return self.work.answer.whole(self.work.choices)

    async def events(self, first: list[Delta]) -> AsyncIterator[str]:
        """Server-sent events: the first chunks, those of the other updates, then the usage if it is wanted."""
        answer = self.work.answer
        try:
            for chunk in first:
                yield answer.event(chunk)
            async for arrived in self.updates:
                for chunk in self.take(arrived):
                    yield answer.event(chunk)
                if arrived is None:
                    yield answer.waiting()
            options = self.work.body.stream_options
            for chunk in answer.ending(self.work.choices, options is not None and options.include_usage):
                yield answer.event(chunk)
        except EngineError as error:
            yield answer.event(answer.failure(problem_of(error)))
        finally:
            await self.updates.aclose()
            self.log()
        yield answer.last

    def take(self, arrived: tuple[Job, Update] | None) -> list[Delta]:
        """The chunks of one update."""
        if arrived is None:
            return []
        job, update = arrived
        choice, new, deltas = self.advance(job, update)
        opening = self.work.answer.opening(choice) if new else []
        return opening + self.work.answer.chunks(choice, deltas, update)

    def advance(self, job: Job, update: Update) -> tuple[Choice, bool, list[Delta]]:
        """The choice of an update, True if it is its first, and the changes to its message."""
        choice, metrics = self.work.choices[job.request.index], self.server.metrics
        now, new = time.perf_counter(), not choice.read
        (metrics.first if new else metrics.next).observe(now - self.times[choice.index])
        self.times[choice.index] = now
        if new:
            choice.begin(job)
        return choice, new, choice.take(update)

    def log(self) -> None:
        """Count the tokens, and log them. The log has no text."""
        for choice in self.work.choices:
            self.server.metrics.count(choice)
        counts = usage(self.work.choices)
        reasons = ", ".join(choice.reason or "left" for choice in self.work.choices[:4])
        numbers = counts["prompt_tokens"], counts["prompt_tokens_details"]["cached_tokens"], counts["completion_tokens"]
        LOG.info("%s: %d tokens read (%d of them cached), %d written: %s", self.work.answer.id, *numbers, reasons)
