"""Errors of the protocol: a status, and a body that clients of the OpenAI protocol understand."""

from typing import Any

from pydantic import ValidationError

from lowbit.errors import EngineError, LowbitError
from lowbit.serve.session import Busy, Ended, Failed

SHOWN = 300  # characters of a message that quotes the request
STATUSES: dict[type[LowbitError], int] = {Busy: 429, Failed: 500, Ended: 503}
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(EngineError):
    """A request that gets an error.

    status  of HTTP
    param   name of the field at fault, if there is one
    code    a word for programs
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def problem_of(error: LowbitError) -> Problem:
    """The protocol's error for one of ours."""
    if isinstance(error, Problem):
        return error
    return Problem(STATUSES.get(type(error), 400), str(error))


def invalid(error: ValidationError) -> Problem:
    """The error for a body that does not have the right form: its deepest fault, without the values of the request."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    fault = max(reversed(faults), key=lambda each: len(each["loc"]))
    where = ".".join(filter(is_field, map(str, fault["loc"])))[:SHOWN]
    message = fault["msg"].removeprefix("Value error, ")[:SHOWN]
    return Problem(400, f"{where}: {message}" if where else message, where or None)


def is_field(part: str) -> bool:
    """True for a field's name: pydantic also names the type that it tried of several, and places in lists."""
    return part.isidentifier() and part[0].islower() and part not in ("str", "bool")
