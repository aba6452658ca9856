"""The HTTP application: the routes of the OpenAI protocol, health, metrics and tokens."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowbit.errors import LowbitError
from lowbit.serve.flow import Gone, unless_gone
from lowbit.serve.limits import LARGE_BODY, LEAST_BODY, TOKEN_BYTES, Gate, body_of
from lowbit.serve.problems import Problem, invalid, problem_of
from lowbit.serve.protocol import Body, ChatBody, DetokenizeBody, TextBody, TokenizeBody
from lowbit.serve.responses import ResponsesBody, responses_work
from lowbit.serve.vocabulary import decoded
from lowbit.serve.work import Run, Server, Work, chat_work, text_work

B = TypeVar("B", bound=Body)
T = TypeVar("T")
LOG = logging.getLogger("lowbit.serve")
SLOW = 8  # requests whose forms are made, or whose long texts become tokens, at a time: threads that others lack
OPEN = 1024  # requests at a time, most of which wait for their bodies or in the queue
GONE = 499  # a client that went away gets no answer; the number is for the metrics
STREAMING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
ROUTES = APIRouter()
PAGE = Path(__file__).with_name("templates") / "chat.html"
# The page is one file: nothing of it comes from elsewhere, and it talks to this server alone.
GUARD = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(server: Server, gate: Gate) -> FastAPI:
    """The application of a server."""
    app = FastAPI(title="lowbit", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server, app.state.gate, app.state.since = server, gate, int(time.time())
    app.state.large, app.state.slow = asyncio.Lock(), asyncio.Semaphore(SLOW)
    app.include_router(ROUTES)
    app.add_exception_handler(LowbitError, on_refusal)
    app.add_exception_handler(HTTPException, on_no_route)
    app.add_exception_handler(Exception, on_fault)
    for gone in (Gone, ClientDisconnect):
        app.add_exception_handler(gone, on_gone)
    app.add_middleware(Watch, server=server)
    return app


async def on_refusal(http: Http, error: Exception) -> Response:
    """The answer to a request that cannot be served."""
    problem = problem_of(error) if isinstance(error, LowbitError) else Problem(500, str(error))
    headers = {"Retry-After": "1"} if problem.status in (429, 503) else None
    return JSONResponse(problem.body(), problem.status, headers)


async def on_no_route(http: Http, error: Exception) -> Response:
    """The answer to a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    asked = f"{http.method} {http.url.path[:60]}: {error.detail}"
    return JSONResponse(Problem(error.status_code, asked).body(), error.status_code, error.headers)


async def on_fault(http: Http, error: Exception) -> Response:
    """The answer to an error of ours. The log has its traceback."""
    return JSONResponse(Problem(500, "an error of the server ended the request; its log has more").body(), 500)


async def on_gone(http: Http, error: Exception) -> Response:
    """No answer: nobody waits for it."""
    return Response(status_code=GONE)


class Watch:
    """Middleware that bounds the number of open requests, and counts answers by path and status."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server, self.open = app, server, 0
        self.paths = {getattr(route, "path", "") for route in ROUTES.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.server.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        if self.open >= OPEN:
            problem = Problem(503, f"{OPEN} requests are open, which is the limit: try again")
            await JSONResponse(problem.body(), 503, {"Retry-After": "1"})(scope, receive, watched)
            return
        self.open += 1
        try:
            await self.app(scope, receive, watched)
        finally:
            self.open -= 1


def admitted(http: Http) -> tuple[Server, str]:
    """The server, and the client's name. Problem if it has no access."""
    return http.app.state.server, http.app.state.gate.client_of(http)


async def parsed(http: Http, kind: type[B]) -> B:
    """The body as `kind`. Problem if it has not the right form."""
    context = http.app.state.server.engine.options.context
    body = await body_of(http, LEAST_BODY + TOKEN_BYTES * context)
    http.state.large = len(body) > LARGE_BODY
    alone = http.app.state.large if http.state.large else nullcontext()
    try:
        async with alone:
            return await run_in_threadpool(kind.model_validate_json, body)
    except ValidationError as error:
        raise invalid(error) from None


async def worked(http: Http, slow: bool, work: Callable[[], T]) -> T:
    """The result of `work` on a thread. Of `slow` ones, and those of large bodies, SLOW run at a time."""
    async with http.app.state.slow if slow or http.state.large else nullcontext():
        return await run_in_threadpool(work)


async def answered(http: Http, kind: type[B], make: Callable[[Server, B], Work]) -> Response:
    """The answer to a completion of any kind: a stream, or a whole."""
    server, client = admitted(http)
    body = await parsed(http, kind)
    work = await worked(http, body.has_form, lambda: make(server, body))
    run = Run(server, work, client)
    if not work.body.stream:
        return JSONResponse(await unless_gone(http, run.whole()))
    first = await unless_gone(http, run.first())
    return StreamingResponse(run.events(first), media_type="text/event-stream", headers=STREAMING)


@ROUTES.post("/v1/chat/completions")
async def chat(http: Http) -> Response:
    """The next message of a conversation."""
    return await answered(http, ChatBody, chat_work)


@ROUTES.post("/v1/completions")
async def complete(http: Http) -> Response:
    """The continuation of texts."""
    return await answered(http, TextBody, text_work)


@ROUTES.post("/v1/responses")
async def respond(http: Http) -> Response:
    """The next items of a conversation."""
    return await answered(http, ResponsesBody, responses_work)


@ROUTES.get("/v1/models")
async def models(http: Http) -> Response:
    """The one model."""
    server, _ = admitted(http)
    return JSONResponse({"object": "list", "data": [facts_of(http, server)]})


@ROUTES.get("/v1/models/{name:path}")
async def model(http: Http) -> Response:
    """The model by its name."""
    server, _ = admitted(http)
    server.require_model(http.path_params["name"])
    return JSONResponse(facts_of(http, server))


def facts_of(http: Http, server: Server) -> dict[str, Any]:
    """The model as the protocol lists it."""
    context = server.engine.options.context
    named = {"id": server.name, "object": "model", "created": http.app.state.since, "owned_by": "lowbit"}
    return named | {"max_model_len": context}


@ROUTES.api_route("/", methods=["GET", "HEAD"])
async def page(http: Http) -> Response:
    """A page to chat. It needs no network but this server."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=GUARD)


@ROUTES.api_route("/health", methods=["GET", "HEAD"])
async def health(http: Http) -> Response:
    """Status 200 while requests are served."""
    alive = http.app.state.server.session.thread.is_alive()
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@ROUTES.get("/metrics")
async def metrics(http: Http) -> Response:
    """Metrics for Prometheus."""
    server, _ = admitted(http)
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


@ROUTES.post("/tokenize")
async def tokenize(http: Http) -> Response:
    """The tokens of a text or of a conversation."""
    server, _ = admitted(http)
    body = await parsed(http, TokenizeBody)
    server.require_model(body.model)
    tokens = await worked(http, False, lambda: tokens_of(server, body))
    return JSONResponse({"count": len(tokens), "max_model_len": server.engine.options.context, "tokens": tokens})


def tokens_of(server: Server, body: TokenizeBody) -> list[int]:
    """The token ids that a body asks for."""
    if body.messages is not None:
        return server.engine.encode_chat([message.plain() for message in body.messages])
    return server.engine.encode(body.prompt or "", body.add_special_tokens)


@ROUTES.post("/detokenize")
async def detokenize(http: Http) -> Response:
    """The text of tokens."""
    server, _ = admitted(http)
    body = await parsed(http, DetokenizeBody)
    server.require_model(body.model)
    vocabulary = server.engine.decoder.architecture.vocabulary
    wrong = next((token for token in body.tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise Problem(400, f"token {wrong} is none of the model's {vocabulary}", "tokens")
    tokenizer = server.engine.require_tokenizer()
    return JSONResponse({"prompt": await worked(http, False, lambda: decoded(tokenizer, body.tokens))})
