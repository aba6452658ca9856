"""Access and amounts: API keys, hosts, sizes of bodies."""

import asyncio
import ipaddress
import json
import re
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from typing import Any

import h11
from starlette.requests import Request as Http
from uvicorn.protocols.http.h11_impl import H11Protocol

from lowbit.errors import UsageError
from lowbit.serve.problems import SHOWN, Problem

LEAST_BODY = 1 << 20  # bytes that a body may always have
TOKEN_BYTES = 64  # more of them for each token of the context
BODY_SECONDS = 30  # for a client to send its body
# Bytes of a body that is parsed while no other one of that size is: it takes 25 times as much then.
LARGE_BODY = 256 << 10
MOST_HEAD = 64 << 10  # bytes of a request before its body
HEAD_SECONDS = 10  # for a client to send the head of a request
UNREAD = 6  # times HEAD_SECONDS in which a client may read nothing of an answer
# Pieces of a body shorter than SMALL_PIECE on average: each takes 0.1 ms of the one thread that all streams share.
MOST_PIECES, SMALL_PIECE = 2048, 64
PORT = re.compile(r":\d*$")  # at the end of a Host header


def read_keys(file: Path | None, given: str | None) -> frozenset[str]:
    """API keys: the lines of a file, without empty ones and those after a #, and those given with commas between."""
    try:
        lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: API keys cannot be read ({error})") from error
    found = [line.partition("#")[0].strip() for line in lines] + [key.strip() for key in (given or "").split(",")]
    keys = frozenset(key for key in found if key)
    if file is not None and not keys:
        raise UsageError(f"{file}: no API key; write one a line")
    return keys


def is_local(host: str) -> bool:
    """True if only programs of this machine reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_guard(host: str, keys: Collection[str]) -> None:
    """UsageError for an address that other machines reach, without keys."""
    if not keys and not is_local(host):
        raise UsageError(
            f"--host {host} can be reached from other machines: give --api-keys FILE or LOWBIT_API_KEYS, or use "
            "127.0.0.1"
        )


class Gate:
    """Access by API key. Without keys everybody on this machine has access, under the machine's own names alone: a
    web page whose name leads here by a trick of DNS has none."""

    def __init__(self, keys: Collection[str]) -> None:
        self.digests = [sha256(key.encode()).digest() for key in keys]

    def client_of(self, http: Http) -> str:
        """A name for the client, for a fair order. Problem if it has no access."""
        address = http.client.host if http.client else ""
        if not self.digests:
            name = PORT.sub("", http.headers.get("host", ""))
            if not is_local(name.strip("[]")):
                raise Problem(403, f"the host {name!r} is no name of this machine: use 127.0.0.1")
            return address
        kind, _, key = http.headers.get("authorization", "").partition(" ")
        digest = sha256(key.strip().encode()).digest()
        if kind.lower() != "bearer" or digest not in self.digests:
            raise Problem(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return digest.hex()


class Pieces(h11.Connection):
    """HTTP on one connection. A body in MOST_PIECES small pieces is an error: 256 KiB that arrive at once can hold
    40,000 chunks of one byte, which took 5 s.

    fault  the client's last error
    """

    count = nbytes = 0
    fault: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        """The next event; RemoteProtocolError for no HTTP, and for a body in too many pieces."""
        try:
            return self.counted(super().next_event())
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise

    def counted(self, event: Any) -> Any:
        """The event, once its bytes are counted."""
        if isinstance(event, h11.Data):
            self.count, self.nbytes = self.count + 1, self.nbytes + len(event.data)
            if self.count > MOST_PIECES and self.nbytes < self.count * SMALL_PIECE:
                raise h11.RemoteProtocolError("a body in too many small pieces")
        elif isinstance(event, h11.Request):
            self.count = self.nbytes = 0
        return event


class Impatient(H11Protocol):
    """A connection that is closed if the head of a request does not arrive, or if an answer is not read: each takes a
    place of a few. An error of HTTP is answered as those of the protocol are.

    before  the last request at the last look
    full    bytes of answers that waited for the client at the last look; `stuck` looks at which they were as many
    """

    before: object = None
    full = stuck = 0
    conn: Pieces

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.conn = Pieces(h11.SERVER, MOST_HEAD)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self.look)

    def look(self) -> None:
        """Close the connection if it has waited for a head since the last look, or for the client to read for UNREAD
        looks."""
        waiting = self.transport.get_write_buffer_size()
        self.full, self.stuck = waiting, self.stuck + 1 if waiting and waiting == self.full else 0
        if self.stuck == UNREAD:
            self.transport.abort()
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.cycle is self.before:
            self.transport.close()
            return
        self.before = self.cycle
        self.loop.call_later(HEAD_SECONDS, self.look)

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with the client's HTTP, unless an answer has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            fault = self.conn.fault
            status = fault.error_status_hint if fault else 400
            body = json.dumps(Problem(status, f"the request is no valid HTTP: {str(fault or msg)[:SHOWN]}").body())
            head = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
            answer = h11.Response(status_code=status, headers=head)
            for event in (answer, h11.Data(data=body.encode()), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def body_of(http: Http, most: int) -> bytes:
    """The body of a request. Problem if it has more than `most` bytes, is too slow, or not declared as plain JSON."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "the body must be JSON: send Content-Type: application/json")
    coding = http.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Problem(415, f"the body is coded as {coding[:SHOWN]!r}: send it as it is")
    body, declared = bytearray(), http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise Problem(413, f"the body has {declared[:20]} bytes; at most {most} are taken")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > most:
                    raise Problem(413, f"the body has more than {most} bytes")
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    return bytes(body)
