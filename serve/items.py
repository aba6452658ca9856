"""Answers of POST /v1/responses: items that follow one another, whole or as named events."""

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from lowbit.engine.sampling import TokenLogprob
from lowbit.serve.answers import Answer, Choice, Delta, usage
from lowbit.serve.job import Update
from lowbit.serve.problems import Problem
from lowbit.serve.vocabulary import Vocabulary

PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
KINDS = {"content": "message", "reasoning_content": "reasoning", "tool_calls": "function_call"}


class ItemsAnswer(Answer):
    """An answer of responses. There is one choice.

    shown  fields of the request that the answer repeats
    items  of the answer so far; the last one may be open
    """

    kind, prefix, last = "response", "resp", ""

    def __init__(self, model: str, vocabulary: Vocabulary, wants_logprobs: bool, shown: Delta) -> None:
        super().__init__(model, vocabulary, wants_logprobs)
        self.id = self.id.replace("-", "_")
        self.shown, self.items, self.open, self.sent = shown, list[Delta](), False, 0

    def event(self, data: Delta) -> str:
        """One server-sent event, with its name."""
        return f"event: {data['type']}\n{super().event(data)}"

    def failure(self, problem: Problem) -> Delta:
        """The event of an error."""
        found = problem.body()["error"]
        return self.numbered("error", code=found["code"] or found["type"], message=found["message"], param=None)

    def ending(self, choices: Iterable[Choice], wants_usage: bool) -> list[Delta]:
        """Nothing: the last event has the usage."""
        return []

    def numbered(self, kind: str, **fields: Any) -> Delta:
        """An event with its number."""
        self.sent += 1
        return {"type": kind, "sequence_number": self.sent - 1} | fields

    def response(self, choice: Choice | None, status: str) -> Delta:
        """The response as it is now."""
        cut = status == "incomplete"
        found = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": list(self.items),
            "usage": None if choice is None else counts(choice),
        }
        return found | self.shown

    def opening(self, choice: Choice) -> list[Delta]:
        return [] if self.sent else self.progress()

    def waiting(self) -> str:
        """That the response is in progress: agents give up a stream without events, and do not count comments."""
        return "".join(map(self.event, self.progress()))

    def progress(self) -> list[Delta]:
        """The events of a response that has begun, the first of them once."""
        names = ("in_progress",) if self.sent else ("created", "in_progress")
        return [self.numbered(f"response.{name}", response=self.response(None, "in_progress")) for name in names]

    def chunks(self, choice: Choice, deltas: list[Delta], update: Update) -> list[Delta]:
        found: list[Delta] = []
        logprobs = self.entries(update.logprobs)
        for delta in deltas:
            for name, value in delta.items():
                found += self.grow(KINDS[name], value, logprobs)
        if choice.reason:
            status = status_of(choice)
            found += self.close(status)
            found.append(self.numbered(f"response.{status}", response=self.response(choice, status)))
        return found

    def entries(self, logprobs: Sequence[TokenLogprob]) -> list[Any]:
        """Log-probabilities as the protocol has them, if they are wanted."""
        return list(self.vocabulary.in_chat(logprobs)["content"]) if self.wants_logprobs else []

    def grow(self, kind: str, value: Any, logprobs: list[Any]) -> list[Delta]:
        """The events of a piece of text, or of whole calls."""
        found: list[Delta] = []
        if kind == "function_call":
            for call in value:
                found += [*self.close("completed"), *self.called(call["function"], call["id"])]
            return found
        if not self.open or self.items[-1]["type"] != kind:
            found += [*self.close("completed"), *self.begun(kind)]
        part = self.items[-1]["content"][0]
        part["text"] += value
        more = {}
        if kind == "message":
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        return [*found, self.at(f"response.{PARTS[kind]}.delta", delta=value, **more)]

    def at(self, kind: str, **fields: Any) -> Delta:
        """An event of the first part of the last item."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
        return self.numbered(kind, **place, **fields)

    def added(self, item: Delta) -> Delta:
        """The event of a new item."""
        self.items.append(item)
        return self.numbered("response.output_item.added", output_index=len(self.items) - 1, item=copied(item))

    def begun(self, kind: str) -> list[Delta]:
        """The events that begin an item of text."""
        self.open = True
        item: Delta = {"id": new_id(kind), "type": kind, "status": "in_progress", "content": []}
        part: Delta = {"type": PARTS[kind], "text": ""}
        if kind == "message":
            item["role"], part["annotations"], part["logprobs"] = "assistant", [], []
        else:
            item["summary"] = []
        begin = self.added(item)
        item["content"] = [part]
        return [begin, self.at("response.content_part.added", part=copied(part))]

    def called(self, function: Delta, identity: str) -> list[Delta]:
        """The events of a call, which comes whole."""
        item = {"id": new_id("function_call"), "type": "function_call", "status": "in_progress", "call_id": identity}
        begin = self.added(item | {"name": function["name"], "arguments": ""})
        self.items[-1] = item | function | {"status": "completed"}
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        arguments, name = function["arguments"], function["name"]
        return [
            begin,
            self.numbered("response.function_call_arguments.delta", **place, delta=arguments),
            self.numbered("response.function_call_arguments.done", **place, arguments=arguments, name=name),
            self.done(),
        ]

    def close(self, status: str) -> list[Delta]:
        """The events that end an open item."""
        if not self.open:
            return []
        self.open = False
        item = self.items[-1]
        item["status"], part = status, item["content"][0]
        more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        return [
            self.at(f"response.{part['type']}.done", text=part["text"], **more),
            self.at("response.content_part.done", part=copied(part)),
            self.done(),
        ]

    def done(self) -> Delta:
        """The event of an item's end."""
        item = copied(self.items[-1])
        return self.numbered("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def whole(self, choices: Iterable[Choice]) -> Delta:
        [choice] = choices
        logprobs = self.entries(choice.logprobs)
        for name, kind in (("reasoning_content", "reasoning"), ("content", "message"), ("tool_calls", "function_call")):
            if name in choice.message:
                self.grow(kind, choice.message[name], logprobs)
        self.close(status_of(choice))
        return self.response(choice, status_of(choice))

    def finished(self, choice: Choice) -> Delta:
        raise NotImplementedError("a response has no list of choices")


def status_of(choice: Choice) -> str:
    """The status of a finished response."""
    return "incomplete" if choice.reason == "length" else "completed"


def counts(choice: Choice) -> Delta:
    """Token counts as responses name them."""
    found = usage([choice])
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": choice.cached, "cache_write_tokens": 0},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": choice.thought},
        "total_tokens": found["total_tokens"],
    }


def new_id(kind: str) -> str:
    """An identity of an item."""
    return f"{PREFIXES[kind]}_{secrets.token_hex(12)}"


def copied(value: Delta) -> Delta:
    """The value as it is now: items grow."""
    found: Delta = json.loads(json.dumps(value))
    return found
