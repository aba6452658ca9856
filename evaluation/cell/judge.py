"""The process that holds the tests: it calls the program's function in another process, and alone gives the verdict.

The program never shares a process with what judges it: there is no frame, no file and no memory of the verdict that it
could reach. Only plain values come back from it.
"""

import builtins
import json
from typing import Any, BinaryIO

from lowbit.evaluation.cell.values import pack, unpack

GONE = "gone"  # a reason that the launcher replaces by what became of the program's process
MEMORY = "memory"
NOT_RAISED = (UnicodeError, StopIteration, StopAsyncIteration)  # one cannot be made of a message, two end a loop


class Gone(BaseException):
    """The program's process ended; no `except Exception` of a test catches that."""


class Raised(Exception):
    """An exception of the program that is not raised here as what it is: the message begins with its name."""


class Candidate:
    """The program's function, at the other end of two pipes."""

    def __init__(self, name: str, requests: BinaryIO, replies: BinaryIO, scope: dict[str, Any]) -> None:
        self.__name__ = name
        self._requests, self._replies, self._scope = requests, replies, scope

    def loaded(self) -> None:
        """Wait until the program has run; raises what it raised."""
        self._answer()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        request = {"arguments": pack(list(arguments)), "named": pack(named)}
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            raise Gone from None
        reply = self._answer()
        for ours, theirs in zip(arguments, unpack(reply["arguments"]), strict=True):
            _take_over(ours, theirs)
        return unpack(reply["value"])

    def _answer(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise Gone
        reply: dict[str, Any] = json.loads(line)
        if "raised" in reply:
            raise self._error(str(reply["raised"]), str(reply["message"]))
        return reply

    def _error(self, name: str, message: str) -> Exception:
        """The exception of that name: Python's, or one that the helpers define, so that tests can expect it.

        Not one that ends an iteration: `all(map(check, cases))` would take it for the end of the cases, and pass.
        """
        kind = self._scope.get(name, getattr(builtins, name, None))
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_RAISED):
            return kind(message)
        return Raised(f"{name}: {message}")


def _take_over(ours: Any, theirs: Any) -> None:
    """Give a mutable argument the contents that the call left in it."""
    if type(ours) is not type(theirs) or ours == theirs:
        return
    if isinstance(ours, list | bytearray):
        ours[:] = theirs
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)


def judge(order: dict[str, str], requests: BinaryIO, replies: BinaryIO) -> str | None:
    """The reason why the program does not pass; None where it does.

    order  helpers: what of the prompt stands before the function; tests: what is run with the function in reach
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    candidate = Candidate(order["entry_point"], requests, replies, scope)
    try:
        candidate.loaded()
        exec(compile(order["helpers"], "helpers.py", "exec"), scope)
        scope[order["entry_point"]] = candidate
        exec(compile(order["tests"], "tests.py", "exec"), scope)
    except Gone:
        return GONE
    except MemoryError:
        return MEMORY
    except Raised as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001  # whatever tests nobody has read may raise
        return f"{type(error).__name__}: {error}"
    return None
