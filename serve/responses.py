"""POST /v1/responses: its body as a conversation. Nothing is kept: a request has the whole conversation."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from annotated_types import MaxLen
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from lowbit.serve.items import ItemsAnswer
from lowbit.serve.problems import Problem, invalid
from lowbit.serve.protocol import (
    MOST_TOOLS,
    MOST_TOP,
    Body,
    ChatBody,
    Described,
    Effort,
    Named,
    StreamOptions,
    few,
)
from lowbit.serve.work import Server, Work, chat_work

LOGPROBS = "message.output_text.logprobs"
TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
# fields of chat completions that are called otherwise here
NAMES = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
STATELESS = "nothing is kept here: send the whole conversation as input"


def joined(value: Any) -> Any:
    """The text of parts. ValueError for parts that are no text."""
    if not isinstance(value, list):
        return value
    for part in few(value):
        if not isinstance(part, dict) or part.get("type") not in TEXTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a part of type {str(kind)[:60]!r}: only text is read here")
    return "".join(part["text"] for part in value)


Text = Annotated[str | None, BeforeValidator(joined)]


class Item(Body):
    """A part of a conversation: a message, a call, what a function returned, or reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: Text = None
    call_id: str = ""
    name: str = ""
    arguments: str = "{}"
    output: Text = None
    # fields of items that this server or another one wrote
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    summary: Text = None
    encrypted_content: str | None = None

    @model_validator(mode="after")
    def whole(self) -> "Item":
        """ValueError if a field is missing."""
        needed = {"message": "content", "function_call": "name", "function_call_output": "output"}.get(self.type)
        if needed is not None and (getattr(self, needed) is None or (needed == "name" and not self.name)):
            raise ValueError(f"an item of type {self.type} needs {needed}")
        return self


class Form(Body):
    """The form of a text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str | None = None
    strict: bool | None = None
    of: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Body):
    """Options of the answer's text."""

    format: Form = Field(default_factory=lambda: Form(type="text", schema=None))
    verbosity: str | None = None


class Reasoning(Body):
    """Options of reasoning. A summary is not made: the reasoning itself is given."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None


class FunctionTool(Described):
    """A function that the model may call."""

    type: Literal["function"]


class ChosenFunction(Named):
    """The function that the model must call."""

    type: Literal["function"]


def functions(value: Any) -> Any:
    """The functions among tools. Other tools run at the server that has them: the model is not told of them here, and
    the answer's `tools` has those that it is told of."""
    if not isinstance(value, list):
        return value
    return [tool for tool in value if not isinstance(tool, dict) or tool.get("type", "function") == "function"]


def items(value: Any) -> Any:
    """A text as a message; items as they are."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else few(value)


class ResponsesBody(Body):
    """POST /v1/responses."""

    model: str
    input: Annotated[list[Item], BeforeValidator(items)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    include: Annotated[list[str], MaxLen(16)] | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool] | None, BeforeValidator(functions), MaxLen(MOST_TOOLS)] = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction = "auto"
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    max_tool_calls: int | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    # extensions
    seed: int | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def stateless(self) -> "ResponsesBody":
        """ValueError for a request that continues another one."""
        if self.previous_response_id is not None or self.conversation is not None:
            raise ValueError(f"previous_response_id and conversation: {STATELESS}")
        return self

    @property
    def has_form(self) -> bool:
        return self.text.format.type != "text" or self.tool_choice not in ("none", "auto")

    def as_chat(self) -> ChatBody:
        """The same request to chat completions."""
        named = ("model", "temperature", "top_p", "seed", "top_k", "min_p", "chat_template_kwargs", "tool_choice")
        found: dict[str, Any] = {name: getattr(self, name) for name in named}
        found |= {"max_completion_tokens": self.max_output_tokens, "stream": bool(self.stream)}
        found["messages"] = messages_of(self)
        found["tools"] = [{"type": "function", "function": plain(tool)} for tool in self.tools or ()] or None
        if not isinstance(self.tool_choice, str):
            found["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.top_logprobs or LOGPROBS in (self.include or ()):
            found |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        form = self.text.format
        if form.type != "text":
            schema = None if form.of is None else {"name": form.name, "schema": form.of}
            found["response_format"] = {"type": form.type, "json_schema": schema}
        found["reasoning_effort"] = None if self.reasoning is None else self.reasoning.effort
        return ChatBody.model_validate(found)


def plain(tool: FunctionTool) -> dict[str, Any]:
    """A function as chat completions describe it."""
    return tool.model_dump(exclude_none=True, exclude={"type"})


def messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """The messages of a conversation. Reasoning and calls belong to the assistant's message around them."""
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    thought = ""
    for item in body.input:
        if item.type == "reasoning":
            thought = item.content or item.summary or ""
        elif item.type == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif item.type == "message":
            role = "system" if item.role == "developer" else item.role
            if role == "system" and found and found[-1]["role"] == "system":  # many templates know one system message
                found[-1]["content"] += f"\n\n{item.content}"
            else:
                found.append({"role": role, "content": item.content})
        else:
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": None})
            call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
            found[-1].setdefault("tool_calls", []).append(call)
        if thought and found and found[-1]["role"] == "assistant":
            found[-1]["reasoning_content"], thought = thought, ""
    return found


def in_own_names(problem: Problem) -> Problem:
    """The problem with the names that fields have in responses."""
    named = problem.param or ""
    own = NAMES.get(named.partition(".")[0])
    if own is None:
        return problem
    message = str(problem)
    return Problem(problem.status, own + message[len(named) :] if message.startswith(named) else message, own)


def responses_work(server: Server, body: ResponsesBody) -> Work:
    """The work of a response."""
    try:
        work = chat_work(server, body.as_chat())
    except ValidationError as error:
        raise in_own_names(invalid(error)) from None
    except Problem as problem:
        raise in_own_names(problem) from None
    shown = {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "temperature": work.requests[0].sampling.temperature,
        "top_p": work.requests[0].sampling.top_p,
        "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)},
        "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        "truncation": "disabled",
        "store": False,
        "metadata": {},
    }
    return replace(work, answer=ItemsAnswer(server.name, server.vocabulary, work.answer.wants_logprobs, shown))
