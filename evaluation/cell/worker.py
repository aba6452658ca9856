"""The worker: a process that runs the program, then answers calls of its function."""

import json
from collections.abc import Callable
from typing import Any, BinaryIO

from lowbit.evaluation.cell.values import pack, unpack


def work(requests: BinaryIO, replies: BinaryIO) -> None:
    """Run the program in the first line of `requests`, then answer each further line with a line on `replies`."""
    order = json.loads(requests.readline())
    scope: dict[str, Any] = {"__name__": "__main__"}
    _reply(replies, lambda: exec(compile(order["program"], "program.py", "exec"), scope))  # the purpose of the sandbox
    for line in requests:
        _reply(replies, lambda: _called(scope, order["entry_point"], json.loads(line)))  # noqa: B023  # called at once


def _called(scope: dict[str, Any], name: str, request: dict[str, Any]) -> dict[str, Any]:
    """The function's value, and its arguments after the call."""
    arguments, named = unpack(request["arguments"]), unpack(request["named"])
    if name not in scope:
        raise NameError(f"the program defines no {name}")
    value = pack(scope[name](*arguments, **named))
    return {"value": value, "arguments": pack(arguments)}


def _reply(replies: BinaryIO, act: Callable[[], Any]) -> None:
    try:
        reply = act() or {"value": None}
    except BaseException as error:  # noqa: BLE001  # an untrusted program may raise anything
        reply = {"raised": type(error).__name__, "message": str(error)[:300]}
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()
