"""A trial of each grammar in a process of its own, since a client's grammar is a program for llguidance.

Four thousand rules that name each other in a chain overflow the stack, and some intersections of patterns take hours:
that ends a child process (grammar_child.py) instead of the server.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lowbit.errors import EngineError
from lowbit.models.child import Children

SECONDS = 2  # limit of processor time per grammar
NBYTES = 1 << 30  # limit of memory per grammar
STACK = 1 << 20  # bytes; the server's threads have twice as much at least
PROCESSES = min(os.cpu_count() or 1, 4)


class Trial:
    """Processes that try grammars over one vocabulary.

    tokenizer  writes it for the child, as JSON
    """

    def __init__(self, tokenizer: Callable[[], str]) -> None:
        script = Path(__file__).with_name("grammar_child.py")
        self._children = Children(PROCESSES, script, NBYTES, SECONDS, STACK, greeting=tokenizer)

    def require(self, source: str, limits: Mapping[str, int]) -> None:
        """EngineError for a grammar that takes too much.

        source  llguidance's own form of a grammar
        limits  the settings of its LLParserLimits
        """
        if self._children.ask(json.dumps({"source": source, "limits": limits})) is None:
            raise EngineError(
                f"the grammar takes more than {SECONDS} s or {NBYTES >> 20} MiB, or its rules name each other in too "
                "long a chain: make it smaller"
            )
