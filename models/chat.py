"""Chat templates, rendered in a child process with limits, since a template is a program from an untrusted source.

transformers renders in Jinja's sandbox. That keeps a template from Python, but not from endless loops or from filling
memory. The child process (template_child.py) starts with the first chat and serves all later ones.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.models.child import Children
from lowbit.models.tokenizer import Tokenizer

SECONDS = 5  # limit of processor time per chat
NBYTES = 512 << 20  # limit of memory beyond the interpreter's own
TEMPLATED = "transformers.tokenization_utils_base"  # the module that renders chats by templates
CHARACTERS = 16 << 20  # limit of rendered text per chat
LIMITS = {
    "memory": f"takes more than {NBYTES >> 20} MiB of memory",
    "text": f"writes more than {CHARACTERS >> 20} million characters",
    "time": f"takes more than {SECONDS} s, or ended the process that renders it",
}


class TemplateRefusal(CheckpointError):
    """The template itself rejected the messages with `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model's chat template refuses these messages: {reason}")
        self.reason = reason


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """`messages` rendered like `tokenizer.apply_chat_template`, within limits.

    variables  more of the template's variables, such as enable_thinking

    TemplateRefusal if the template raises, or if a message holds values that are not JSON. CheckpointError if there is
    no template, or if it exceeds a limit.
    """
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    own = getattr(type(tokenizer), "apply_chat_template", None)
    if own is not None and own.__module__ != TEMPLATED:  # a class that renders by code of its own
        return _by_itself(tokenizer, messages, tools, {**(variables or {}), **options})
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise CheckpointError(
            f"the model has no chat template ({str(error).split('. ')[0]}); pass plain text"
        ) from error
    settings = {
        **(variables or {}),
        "chat_template": template,
        "tools": tools,
        **options,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return _renderer().render({"messages": kept, "settings": settings})


def _by_itself(tokenizer: Any, messages: Sequence[Any], tools: Any, options: dict[str, Any]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))
    except Exception as error:  # such code may raise anything
        raise TemplateRefusal(str(error)) from error


class Renderer:
    """The child process that renders. Started on demand, and again after a template killed it."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("template_child.py")
        self._children = Children(1, script, NBYTES, SECONDS, CHARACTERS)

    def render(self, request: dict[str, Any]) -> str:
        """The rendered text. CheckpointError as in `render_chat`."""
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateRefusal(f"they hold what is not JSON ({error})") from error
        answer = self._children.ask(line) or {"limit": "time"}
        if "refused" in answer:
            raise TemplateRefusal(answer["refused"])
        if "limit" in answer:
            raise CheckpointError(f"the model's chat template {LIMITS[answer['limit']]}; pass plain text, without it")
        text = str(answer["text"])
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TemplateRefusal("it writes half a surrogate pair, which is no Unicode") from error
        return text


@cache
def _renderer() -> Renderer:
    return Renderer()
