"""The judge: a process that runs the tests, which call the program's function in another process.

The program never shares a process with its judge, so no frame, file or memory of the verdict is within its reach. It
can return only plain values.
"""

import builtins
import json
from typing import Any, BinaryIO

from lowbit.evaluation.cell.values import pack, unpack

GONE = "gone"  # placeholder that the launcher replaces with the fate of the program's process
MEMORY = "memory"
NOT_RAISED = (
    UnicodeError,
    StopIteration,
    StopAsyncIteration,
)  # no message alone makes the first; two end a loop


class Gone(BaseException):
    """The program's process ended. Not an Exception, so that tests cannot catch it by accident."""


class Raised(Exception):
    """An exception of the program without an equivalent here; its message starts with the exception's name."""


class Candidate:
    """The program's function, called through two pipes."""

    def __init__(self, name: str, requests: BinaryIO, replies: BinaryIO, scope: dict[str, Any]) -> None:
        self.__name__ = name
        self._requests, self._replies, self._scope = requests, replies, scope

    def loaded(self) -> None:
        """Wait until the program has run. Raises the program's exception, if any."""
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
        """The exception with this name: Python's own, or one defined by the helpers, so that tests can expect it.

        Exceptions that end an iteration are excluded: `all(map(check, cases))` would take one for the end of the cases,
        and pass.
        """
        kind = self._scope.get(name, getattr(builtins, name, None))
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_RAISED):
            return kind(message)
        return Raised(f"{name}: {message}")


def _take_over(ours: Any, theirs: Any) -> None:
    """Copy the contents of a mutable argument after the call into the test's own object."""
    if type(ours) is not type(theirs) or ours == theirs:
        return
    if isinstance(ours, list | bytearray):
        ours[:] = theirs
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)


def judge(order: dict[str, str], requests: BinaryIO, replies: BinaryIO) -> str | None:
    """The reason why the program does not pass, or None.

    order  helpers: the part of the prompt before the function; tests: code that may call the function
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
    except BaseException as error:  # noqa: BLE001  # untrusted tests may raise anything
        return f"{type(error).__name__}: {error}"
    return None
