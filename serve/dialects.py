"""The ways in which chat templates write tool calls and reasoning, as tables, and a reader that separates them."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.engine.text import overlap
from lowbit.models.tokenizer import Tokenizer

Call = tuple[str, str]  # a function's name, and its arguments as JSON


@dataclass(frozen=True)
class Dialect:
    """A way to write tool calls.

    sign       a part of the chat templates that use it
    begin, end texts around the calls; without an end they go to the end of the message
    arguments  the key of a call's arguments
    listed     True if the calls are a list
    bare       True if a message that begins with a brace is calls too
    read       the calls of a text between begin and end; ValueError if it holds none
    """

    sign: str
    begin: str
    end: str
    arguments: str
    read: Callable[[str], list[Call]]
    listed: bool = False
    bare: bool = False

    def schema(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The schema of the text between begin and end."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, self.arguments: tool.get("parameters") or {}},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        one = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return {"type": "array", "items": one, "minItems": 1, "maxItems": len(calls)} if self.listed else one


def read_objects(text: str) -> list[Call]:
    """Calls as JSON objects, one after another or in a list."""
    found, rest, decoder = [], text.strip(), json.JSONDecoder()
    while rest:
        value, end = decoder.raw_decode(rest)
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(" \n;,")
    return [call_of(value) for value in found]


def read_named(text: str) -> list[Call]:
    """Calls as a name before an object, or as a list of objects."""
    if text.lstrip().startswith("["):
        return read_objects(text)
    found, decoder = [], json.JSONDecoder()
    for part in filter(str.strip, text.split("[TOOL_CALLS]")):
        name = re.match(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*", part)
        if name is None:
            raise ValueError(f"no name in {part[:60]!r}")
        value, _ = decoder.raw_decode(part[name.end() :])
        found.append((name[1], json.dumps(value, ensure_ascii=False)))
    return found


def call_of(value: Any) -> Call:
    """A call as an object with its name and arguments. ValueError if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no object with a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


DIALECTS = {
    "qwen": Dialect("<tool_call>", "<tool_call>", "</tool_call>", "arguments", read_objects),
    "mistral": Dialect("[TOOL_CALLS]", "[TOOL_CALLS]", "", "arguments", read_named, listed=True),
    "llama": Dialect("<|python_tag|>", "<|python_tag|>", "", "parameters", read_objects, bare=True),
    "llama-3.2": Dialect('"parameters": dictionary', "<|python_tag|>", "", "parameters", read_objects, bare=True),
}
REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def dialect_of(template: str) -> Dialect | None:
    """The dialect of a chat template, or None."""
    return next((dialect for dialect in DIALECTS.values() if dialect.sign in template), None)


def reasoning_of(template: str) -> tuple[str, str] | None:
    """The texts around the reasoning that a chat template knows, or None."""
    return next((marks for marks in REASONING if marks[0] in template or marks[1] in template), None)


def hidden_tokens(tokenizer: Tokenizer, shown: Iterable[str]) -> frozenset[int]:
    """The special tokens without those that `shown` names: they are left out of a text."""
    wanted = set(shown)
    return frozenset(
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in wanted
    )


@dataclass
class Reader:
    """Separates a message's text into content, reasoning and tool calls. A call is given out whole.

    dialect   of tool calls; None leaves them in the content
    marks     around reasoning; None leaves it in the content
    thinking  True if the prompt has already begun the reasoning
    """

    dialect: Dialect | None = None
    marks: tuple[str, str] | None = None
    thinking: bool = False
    held: str = ""
    calling: bool = False
    started: bool = False
    calls: int = 0

    def __post_init__(self) -> None:
        self.fresh = self.thinking  # after a mark of reasoning line breaks are no text

    def feed(self, text: str, done: bool) -> list[dict[str, Any]]:
        """The changes that a piece of text makes to the message."""
        self.held += text
        found: list[dict[str, Any]] = []
        while (deltas := self.next(done)) is not None:
            found += deltas
        return found

    def next(self, done: bool) -> list[dict[str, Any]] | None:
        """The changes up to the next mark, or None if the rest of the text has to wait."""
        if self.thinking:
            assert self.marks is not None
            return self.until((self.marks[1],), "reasoning_content", done)
        if self.calling:
            return self.whole_calls(done)
        if not self.started and self.dialect is not None and self.dialect.bare and self.held.strip():
            self.calling = self.held.lstrip().startswith("{")
            if self.calling:
                return []
        marks = [self.dialect.begin] if self.dialect is not None else []
        return self.until((*marks, *(self.marks[:1] if self.marks is not None else ())), "content", done)

    def until(self, marks: Sequence[str], name: str, done: bool) -> list[dict[str, Any]] | None:
        """The text up to a mark as the field `name`. The mark itself is left out."""
        if not self.held:
            return None
        places = [(at, mark) for mark in marks if (at := self.held.find(mark)) >= 0]
        at, mark = min(places, default=(-1, ""))
        end = at if mark else len(self.held) if done else len(self.held) - self.waiting(marks)
        text, self.held = self.held[:end], self.held[end + len(mark) :]
        text = text.lstrip("\n") if self.fresh else text
        self.fresh, self.started = self.fresh and not text, self.started or bool(text.strip())
        if mark:
            self.calling = self.dialect is not None and mark == self.dialect.begin
            self.thinking = self.marks is not None and mark == self.marks[0]
            self.fresh = self.fresh or self.thinking or name == "reasoning_content"
        return [{name: text}] if text else [] if mark else None

    def waiting(self, marks: Sequence[str]) -> int:
        """Characters at the end that may become a mark."""
        return max((overlap(self.held, mark) for mark in marks), default=0)

    def whole_calls(self, done: bool) -> list[dict[str, Any]] | None:
        """The calls up to their end; as content if they are none."""
        assert self.dialect is not None
        end = self.dialect.end
        at = self.held.find(end) if end else -1
        if at < 0 and not done:
            return None
        body = self.held if at < 0 else self.held[:at]
        self.held, self.calling, self.started = "" if at < 0 else self.held[at + len(end) :], False, True
        try:
            calls = self.dialect.read(body)
        except (ValueError, RecursionError):
            return [{"content": body if self.dialect.bare else self.dialect.begin + body + end * (at >= 0)}]
        return [self.delta(name, arguments) for name, arguments in calls]

    def delta(self, name: str, arguments: str) -> dict[str, Any]:
        """A call as a change to the message."""
        self.calls += 1
        function = {"name": name, "arguments": arguments}
        call = {
            "index": self.calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": function,
        }
        return {"tool_calls": [call]}

    def finish(self, reason: str) -> str:
        """The protocol's reason for the end."""
        return "tool_calls" if self.calls and reason == "stop" else reason
