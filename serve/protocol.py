"""The bodies of requests, as the OpenAI protocol has them, with the extensions that other servers share."""

import json
import re
from typing import Annotated, Any, Literal

from annotated_types import MaxLen, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lowbit.errors import nearest

MOST_STOPS = 64
MOST_CHOICES = 128
MOST_TOP = 20
MOST_TOOLS = 128
MOST_BIASES = 1024
MOST_PARTS = 4096  # messages of a conversation, parts of a message
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # of a token, in one way: JSON's names differ where the tokens are to differ


def ints(value: Any) -> Any:
    """A list of integers. ValueError at the first element that is none: a list may have millions."""
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise ValueError("a list of token ids is needed")
    return value


def prompts(value: Any) -> Any:
    """A prompt, or a list of prompts. ValueError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        for kind in (int, str):
            if all(type(each) is kind for each in value):
                return value
        if all(isinstance(each, list) for each in value):
            return [ints(each) for each in value]
    raise ValueError("a text, a list of token ids, or a list of either is needed, not an empty one")


def few(value: Any) -> Any:
    """A list of at most MOST_PARTS parts. ValueError before any of them is looked at."""
    if isinstance(value, list) and len(value) > MOST_PARTS:
        raise ValueError(f"{len(value)} parts are more than {MOST_PARTS}")
    return value


def text_parts(value: Any) -> Any:
    """A text, or a list of parts. ValueError for parts that are no text."""
    for part in few(value) if isinstance(value, list) else ():
        if isinstance(part, dict) and part.get("type") != "text":
            raise ValueError(f"a part of type {str(part.get('type'))[:60]!r}: only text is read here")
    return value


def numbered(biases: dict[str, float]) -> dict[str, float]:
    """Biases by token ids as JSON has them. ValueError for a name that is no token id."""
    wrong = next((name for name in biases if not NUMBER.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(f"{wrong[:60]!r} is no token id")
    return biases


Stop = Annotated[str, MinLen(1), MaxLen(1000)]
Tokens = Annotated[list[int], BeforeValidator(ints)]
# Fields that change nothing in what one server on one machine writes.
IGNORED = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "verbosity", "client_metadata"),
)


class Body(BaseModel):
    """A body. A field that is not known is refused: it would be left out in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields in JSON."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @property
    def has_form(self) -> bool:
        """True if the answer is to have a form, which takes time to prepare."""
        return False

    @model_validator(mode="before")
    @classmethod
    def without_ignored(cls, values: Any) -> Any:
        """The fields that change something. Null stands for a field that is left out: clients send what the protocol's
        types have as null, and send back what they got. ValueError for the first field that is not known."""
        if not isinstance(values, dict):
            return values
        known, given = cls.names(), {name: value for name, value in values.items() if value is not None}
        unknown = next((name for name in given if name not in known and name not in IGNORED), None)
        if unknown is not None:
            raise ValueError(f"the field {unknown[:60]!r} is not known here; {nearest(unknown[:60], known)}")
        return {name: value for name, value in given.items() if name in known}


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Schema(Body):
    """A JSON schema with its name."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    # a field called schema would hide one of pydantic's methods
    of: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def with_schema(self) -> "ResponseFormat":
        """ValueError if the schema is missing."""
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs the field json_schema")
        return self


class StructuredOutputs(Body):
    """The form of an answer, as vLLM's extension has it: one of these."""

    of: dict[str, Any] | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Stop], MinLen(1), MaxLen(MOST_PARTS)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def one(self) -> "StructuredOutputs":
        """ValueError unless one form is given."""
        if sum(each is not None for each in (self.of, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give one of json, regex, choice and grammar")
        return self


class Settings(Body):
    """Settings of sampling that both kinds of completions have. None stands for the model's own default."""

    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], MaxLen(MOST_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], MaxLen(MOST_BIASES), AfterValidator(numbered)] | None = None
    response_format: ResponseFormat | None = None
    # extensions
    structured_outputs: StructuredOutputs | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], MaxLen(MOST_STOPS)] = []

    @property
    def has_form(self) -> bool:
        return self.response_format is not None or self.structured_outputs is not None

    def sampling(self) -> dict[str, Any]:
        """The fields of a Sampling that the request sets."""
        named = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed")
        found = {name: getattr(self, name) for name in (*named, "frequency_penalty")}
        found |= {"min_new_tokens": self.min_tokens, "top_k": None if self.top_k is None else max(self.top_k, 0)}
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        always = {"ignore_eos": self.ignore_eos, "stop": tuple(stops), "stop_tokens": tuple(self.stop_token_ids)}
        always |= {"bias": tuple((int(name), value) for name, value in (self.logit_bias or {}).items())}
        return always | {name: value for name, value in found.items() if value is not None}


class TextBody(Settings):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(prompts)]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class Function(Body):
    """A function's call within a message of the assistant."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call that the assistant made in an earlier turn."""

    id: str = ""
    type: Literal["function"] = "function"
    index: int | None = None
    function: Function


class TextPart(Body):
    """A part of a message. Only text is read."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(text_parts)] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], BeforeValidator(few)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message as chat templates read it: one text, arguments as an object, no field that is empty."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        named = ("name", "tool_call_id", "reasoning_content")
        found |= {name: value for name in named if (value := getattr(self, name)) is not None}
        if self.tool_calls:
            found["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": read(call)}}
                for call in self.tool_calls
            ]
        return found


def read(call: ToolCall) -> Any:
    """A call's arguments as an object; as text if they are none."""
    try:
        found = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments
    return found if isinstance(found, dict) else call.function.arguments


class Described(Body):
    """A function that the model may call."""

    name: Annotated[str, MinLen(1), MaxLen(64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool. There are only functions."""

    type: Literal["function"]
    function: Described


class Named(Body):
    """A function by its name."""

    name: str


class Chosen(Body):
    """The function that the model must call."""

    type: Literal["function"]
    function: Named


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatBody(Settings):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], MinLen(1), BeforeValidator(few)]
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    tools: Annotated[list[Tool], MaxLen(MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen = "auto"
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] = {}
    modalities: Annotated[list[Literal["text"]], MaxLen(1)] | None = None

    @property
    def has_form(self) -> bool:
        return super().has_form or self.tool_choice not in ("none", "auto")

    def variables(self) -> dict[str, Any]:
        """Variables of the chat template: templates name the effort of reasoning, or turn it on and off."""
        effort = self.reasoning_effort
        named = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return named | self.chat_template_kwargs


class TokenizeBody(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], BeforeValidator(few)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def one_of_both(self) -> "TokenizeBody":
        """ValueError unless either a prompt or messages are given."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens


def offered(body: ChatBody) -> list[dict[str, Any]]:
    """The tools that the model is told of."""
    if body.tool_choice == "none":
        return []
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or ()]
