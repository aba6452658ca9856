"""Grammars: masks of the tokens that may come next, from a JSON schema, a pattern or a grammar."""

import json
from collections.abc import Mapping, Sequence
from time import thread_time
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits
from torch import Tensor

from lowbit.errors import EngineError
from lowbit.serve.dialects import Dialect
from lowbit.serve.problems import SHOWN, Problem
from lowbit.serve.protocol import ChatBody, ResponseFormat, Settings, StructuredOutputs
from lowbit.serve.vocabulary import Vocabulary

# Space between the parts of a JSON text: enough to indent it. A weak model would repeat more of it without an end.
SPACE: Any = {"whitespace_pattern": " |\\n {0,16}"}

# For the regular expressions of a grammar; llguidance's own value is 1,000,000. With that a{1000}{1000}{1000} takes
# 1.2 s of one core, with this 0.3 s; an object of 100 properties that each have a pattern needs less.
FUEL = 400_000

# Symbols of a grammar's rules; llguidance's own value is 500,000. With 20,000 alternatives a step took 6 s.
SYMBOLS = 50_000
LIMITS: Any = {"initial_lexer_fuel": FUEL, "max_grammar_size": SYMBOLS}
STEP_SECONDS = 0.5  # of processor time for a token, while every other request waits


class Grammar:
    """A grammar, and its state after the tokens so far. EngineError if it is none, or too large."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.check()

    def copy(self) -> "Grammar":
        """The same grammar in the same state."""
        return Grammar(self.matcher.deep_copy())

    def fill(self, row: Tensor) -> None:
        """Write the mask of the next token: int32, one bit per token."""
        begun = thread_time()
        words = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.int32)
        self.check(thread_time() - begun)
        row.copy_(words[: len(row)])

    def take(self, token: int) -> None:
        """Go on by a token that the mask allowed."""
        begun = thread_time()
        self.matcher.consume_token(token)
        self.check(thread_time() - begun)

    @property
    def ended(self) -> bool:
        """True if no token may follow but an end token."""
        return bool(self.matcher.is_stopped())

    def check(self, seconds: float = 0) -> None:
        """EngineError if the matcher has failed, or took more than STEP_SECONDS."""
        if self.matcher.is_error():
            raise EngineError(f"the grammar cannot be followed: {reason_of(self.matcher.get_error())}")
        if seconds > STEP_SECONDS:
            raise EngineError(f"the grammar took {seconds:.1f} s for one token: make it simpler")


def reason_of(error: str) -> str:
    """llguidance's reason against a grammar, without the state of its parser."""
    reason = " ".join(error.partition("<state>")[0].split())
    return "no text follows it" if reason == "NoExtensionBias" else reason[:SHOWN]


def made(vocabulary: Vocabulary, source: str) -> Grammar:
    """The grammar of llguidance's own source, once another process has survived it.

    The first mask costs the most, so it is computed here: a request has a thread of its own for it, the batch has one
    for all.
    """
    assert vocabulary.masks is not None
    vocabulary.trial.require(source, LIMITS)
    matcher = LLMatcher(vocabulary.masks, source, log_level=0, limits=LLParserLimits(**LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return Grammar(matcher)


def json_grammar(vocabulary: Vocabulary, schema: Mapping[str, Any] | bool) -> Grammar:
    """JSON texts of a schema."""
    if isinstance(schema, bool):
        if not schema:
            raise EngineError("the schema is false, which no text follows")
        schema = {}
    try:
        source = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACE)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"the schema cannot be read: {error}") from error
    return made(vocabulary, source)


def pattern_grammar(vocabulary: Vocabulary, pattern: str) -> Grammar:
    """Texts that match a regular expression."""
    return made(vocabulary, LLMatcher.grammar_from_regex(pattern))


def lark_grammar(vocabulary: Vocabulary, source: str) -> Grammar:
    """Texts of a grammar in Lark's syntax, as llguidance reads it."""
    return made(vocabulary, LLMatcher.grammar_from_lark(source))


def choice_grammar(vocabulary: Vocabulary, choices: Sequence[str]) -> Grammar:
    """One of several texts."""
    return lark_grammar(vocabulary, "start: " + " | ".join(json.dumps(choice) for choice in choices))


def grammar_of(vocabulary: Vocabulary, body: Settings) -> Grammar | None:
    """The grammar that a body asks for, or None. Problem if it cannot be followed."""
    form, other = body.response_format, body.structured_outputs
    if (form is None or form.type == "text") and other is None:
        return None
    field = "structured_outputs" if other is not None else "response_format"
    if vocabulary.masks is None:
        raise Problem(400, "llguidance does not read the model's tokenizer: its answers have no form", field)
    if body.min_tokens:
        raise Problem(400, "min_tokens goes with no form of the answer: the form says where it ends", "min_tokens")
    try:
        return other_grammar(vocabulary, other) if other is not None else format_grammar(vocabulary, form)
    except EngineError as error:
        raise Problem(400, str(error), field) from error


def format_grammar(vocabulary: Vocabulary, form: ResponseFormat | None) -> Grammar:
    """The grammar of a response_format."""
    schema = None if form is None else form.json_schema
    return json_grammar(vocabulary, {"type": "object"} if schema is None else schema.of)


def other_grammar(vocabulary: Vocabulary, form: StructuredOutputs) -> Grammar:
    """The grammar of structured_outputs."""
    if form.regex is not None:
        return pattern_grammar(vocabulary, form.regex)
    if form.choice is not None:
        return choice_grammar(vocabulary, form.choice)
    if form.grammar is not None:
        return lark_grammar(vocabulary, form.grammar)
    return json_grammar(vocabulary, form.of if form.of is not None else {})


def call_grammar(vocabulary: Vocabulary, dialect: Dialect | None, body: ChatBody) -> Grammar | None:
    """The grammar of the tool calls that a body requires, or None. Problem if they cannot be made."""
    choice = body.tool_choice
    if isinstance(choice, str) and choice != "required":
        return None
    wanted = [tool.function.model_dump() for tool in body.tools or ()]
    if not isinstance(choice, str):
        wanted = [tool for tool in wanted if tool["name"] == choice.function.name]
    if not wanted or dialect is None:
        raise Problem(400, "tool_choice names no function of tools", "tool_choice")
    if vocabulary.masks is None:
        raise Problem(400, "llguidance does not read the model's tokenizer: no call can be required", "tool_choice")
    texts = [vocabulary.literal(text) for text in (dialect.begin, dialect.end) if text]
    before, after = ([] if dialect.bare else texts[:1]), texts[1:]
    schema = dialect.schema(wanted) | {"x-guidance": SPACE}
    lark = " ".join(["start:", *before, "calls", *after]) + f"\ncalls: %json {json.dumps(schema)}"
    try:
        return lark_grammar(vocabulary, lark)
    except EngineError as error:
        raise Problem(400, str(error), "tools") from error
