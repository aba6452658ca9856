"""Child process of serve/trial.py: makes grammars with llguidance as the server would, within limits.

Run as a script by a bare interpreter. argv: module paths as JSON, bytes of memory, seconds of processor time and bytes
of the stack. The first line of the input is the tokenizer.
"""

import json
import sys
import threading
from functools import partial
from typing import Any

sys.path[:] = json.loads(sys.argv[1])

from llguidance import LLMatcher, LLParserLimits, LLTokenizer  # noqa: E402  # found through sys.path

from lowbit.models.answering import answer_lines  # noqa: E402


def answer(tokenizer: LLTokenizer, request: dict[str, Any]) -> dict[str, Any]:
    """Nothing, once the grammar and its first mask are made. A grammar that is none is found out by the server."""
    matcher = LLMatcher(tokenizer, request["source"], log_level=0, limits=LLParserLimits(**request["limits"]))
    if not matcher.is_error():
        matcher.deep_copy().compute_bitmask()
    return {}


def main(nbytes: int, seconds: int, stack: int) -> None:
    """Answer each line on a thread with a stack smaller than those of the server: llguidance recurses."""
    greeting = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(greeting["tokenizer"], n_vocab=greeting["tokens"], eos_token=greeting["ends"])
    threading.stack_size(stack)
    thread = threading.Thread(target=answer_lines, args=(partial(answer, tokenizer), nbytes, seconds))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main(*map(int, sys.argv[2:5]))
