"""Child process of models/chat.py: renders chat templates as transformers does, within limits.

Run as a script by a bare interpreter. argv: module paths as JSON, bytes of memory, seconds of processor time and
characters per chat. Reads and answers one line of JSON at a time.
"""

import json
import resource
import signal
import sys
from typing import Any

sys.path[:] = json.loads(sys.argv[1])

from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402  # found through sys.path


def main(nbytes: int, seconds: int, characters: int) -> None:
    """Answer each line. The kernel kills this process if one takes too long."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + nbytes, taken + nbytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(json.loads(line), characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(request: dict[str, Any], characters: int) -> dict[str, Any]:
    try:
        text = render_jinja_template([request["messages"]], **request["settings"])[0][0]
    except MemoryError:
        return {"limit": "memory"}
    except Exception as error:  # noqa: BLE001  # a template is untrusted code, and may raise anything
        return {"refused": (str(error) or type(error).__name__)[:300]}
    return {"text": text} if len(text) <= characters else {"limit": "text"}


if __name__ == "__main__":
    main(*map(int, sys.argv[2:5]))
