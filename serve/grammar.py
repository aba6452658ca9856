"""Grammars: masks of the tokens that may come next, from a JSON schema, a pattern or a grammar."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from lowbit.errors import EngineError
from lowbit.serve.dialects import Dialect
from lowbit.serve.problems import Problem
from lowbit.serve.protocol import ChatBody, ResponseFormat, Settings, StructuredOutputs
from lowbit.serve.vocabulary import Vocabulary

# Space between the parts of a JSON text: enough to indent it. A weak model would repeat more of it without an end.
SPACE: Any = {"whitespace_pattern": " |\\n {0,16}"}

# For the regular expressions of a grammar; llguidance's own value is 1,000,000. With that a{1000}{1000}{1000} takes
# 1.2 s of one core, with this 0.3 s; an object of 100 properties that each have a pattern needs less.
FUEL = 400_000


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
        words = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.int32)
        self.check()
        row.copy_(words[: len(row)])

    def take(self, token: int) -> None:
        """Go on by a token that the mask allowed."""
        self.matcher.consume_token(token)
        self.check()

    @property
    def ended(self) -> bool:
        """True if no token may follow but an end token."""
        return bool(self.matcher.is_stopped())

    def check(self) -> None:
        """EngineError if the matcher has failed."""
        if self.matcher.is_error():
            raise EngineError(f"the grammar cannot be followed: {' '.join(self.matcher.get_error().split())[:300]}")


def made(tokenizer: LLTokenizer, source: str) -> Grammar:
    """The grammar of llguidance's own source. The first mask costs the most, so it is computed here: a request has a
    thread of its own for it, the batch has one for all."""
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(initial_lexer_fuel=FUEL))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return Grammar(matcher)


def json_grammar(tokenizer: LLTokenizer, schema: Mapping[str, Any] | bool) -> Grammar:
    """JSON texts of a schema."""
    try:
        source = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACE)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"the schema cannot be read: {error}") from error
    return made(tokenizer, source)


def pattern_grammar(tokenizer: LLTokenizer, pattern: str) -> Grammar:
    """Texts that match a regular expression."""
    return made(tokenizer, LLMatcher.grammar_from_regex(pattern))


def lark_grammar(tokenizer: LLTokenizer, source: str) -> Grammar:
    """Texts of a grammar in Lark's syntax, as llguidance reads it."""
    return made(tokenizer, LLMatcher.grammar_from_lark(source))


def choice_grammar(tokenizer: LLTokenizer, choices: Sequence[str]) -> Grammar:
    """One of several texts."""
    return lark_grammar(tokenizer, "start: " + " | ".join(json.dumps(choice) for choice in choices))


def grammar_of(vocabulary: Vocabulary, body: Settings) -> Grammar | None:
    """The grammar that a body asks for, or None. Problem if it cannot be followed."""
    form, other = body.response_format, body.structured_outputs
    if (form is None or form.type == "text") and other is None:
        return None
    tokenizer = vocabulary.masks
    if tokenizer is None:
        raise Problem(
            400, "llguidance does not read the model's tokenizer: its answers have no form", "response_format"
        )
    if body.min_tokens:
        raise Problem(400, "min_tokens goes with no form of the answer: the form says where it ends", "min_tokens")
    try:
        return other_grammar(tokenizer, other) if other is not None else format_grammar(tokenizer, form)
    except EngineError as error:
        raise Problem(400, str(error), "structured_outputs" if other is not None else "response_format") from error


def format_grammar(tokenizer: LLTokenizer, form: ResponseFormat | None) -> Grammar:
    """The grammar of a response_format."""
    schema = None if form is None else form.json_schema
    return json_grammar(tokenizer, {"type": "object"} if schema is None else schema.of)


def other_grammar(tokenizer: LLTokenizer, form: StructuredOutputs) -> Grammar:
    """The grammar of structured_outputs."""
    if form.regex is not None:
        return pattern_grammar(tokenizer, form.regex)
    if form.choice is not None:
        return choice_grammar(tokenizer, form.choice)
    if form.grammar is not None:
        return lark_grammar(tokenizer, form.grammar)
    return json_grammar(tokenizer, form.of if form.of is not None else {})


def call_grammar(vocabulary: Vocabulary, dialect: Dialect | None, body: ChatBody) -> Grammar | None:
    """The grammar of the tool calls that a body requires, or None. Problem if they cannot be made."""
    choice = body.tool_choice
    if isinstance(choice, str) and choice != "required":
        return None
    wanted = [tool.function.model_dump() for tool in body.tools or ()]
    if not isinstance(choice, str):
        wanted = [tool for tool in wanted if tool["name"] == choice.function.name]
    tokenizer = vocabulary.masks
    if not wanted or dialect is None:
        raise Problem(400, "tool_choice names no function of tools", "tool_choice")
    if tokenizer is None:
        raise Problem(400, "llguidance does not read the model's tokenizer: no call can be required", "tool_choice")
    texts = [vocabulary.literal(text) for text in (dialect.begin, dialect.end) if text]
    before, after = ([] if dialect.bare else texts[:1]), texts[1:]
    schema = dialect.schema(wanted) | {"x-guidance": SPACE}
    lark = " ".join(["start:", *before, "calls", *after]) + f"\ncalls: %json {json.dumps(schema)}"
    try:
        return lark_grammar(tokenizer, lark)
    except EngineError as error:
        raise Problem(400, str(error), "tools") from error
