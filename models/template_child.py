"""Child process of models/chat.py: renders chat templates as transformers does, within limits.

Run as a script by a bare interpreter. argv: module paths as JSON, bytes of memory, seconds of processor time and
characters per chat.
"""

import json
import sys
from functools import partial
from typing import Any

sys.path[:] = json.loads(sys.argv[1])

from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402  # found through sys.path

from lowbit.models.answering import answer_lines  # noqa: E402


def answer(characters: int, request: dict[str, Any]) -> dict[str, Any]:
    """The text of a chat, the reason why the template refuses it, or the limit that it exceeds."""
    try:
        text = render_jinja_template([request["messages"]], **request["settings"])[0][0]
    except MemoryError:
        return {"limit": "memory"}
    except Exception as error:  # noqa: BLE001  # a template is untrusted code, and may raise anything
        return {"refused": (str(error) or type(error).__name__)[:300]}
    return {"text": text} if len(text) <= characters else {"limit": "text"}


if __name__ == "__main__":
    answer_lines(partial(answer, int(sys.argv[4])), int(sys.argv[2]), int(sys.argv[3]))
