"""Start and end of the server: the engine, a session over it, and uvicorn."""

import asyncio
import gc
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
import uvicorn

from lowbit.engine.engine import Engine
from lowbit.engine.sampling import Sampling
from lowbit.engine.workspace import free_nbytes, on_gpu
from lowbit.errors import CheckpointError, EngineError, UsageError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.plain import read_json
from lowbit.progress import Step, tell
from lowbit.serve.app import make_app
from lowbit.serve.drafts import NO_LOOKUP, Lookup
from lowbit.serve.limits import Gate, Impatient, require_guard
from lowbit.serve.metrics import Metrics
from lowbit.serve.session import SEQUENCES, WAITING, Session
from lowbit.serve.vocabulary import Vocabulary
from lowbit.serve.work import Server

SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
ROOM = 0.9  # share of a GPU's free memory that keys and values may take
CONNECTIONS = 1024
WARM_UP = 3  # tokens written before the server is ready
LAST_ANSWERS = 5  # seconds for open answers after a signal to end; then they end with an error
LAST_BYTES = 5  # seconds for clients to read that


@dataclass(frozen=True)
class Options:
    """Options of a server.

    name       of the model, as clients call it
    keys       API keys; without any, only programs of this machine have access
    defaults   settings of requests that leave them out
    sequences  requests served at a time; None for as many as fit, at most SEQUENCES
    waiting    most requests in the queue
    lookup     drafts from the text
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Collection[str] = frozenset()
    defaults: Sampling = field(default_factory=Sampling)
    sequences: int | None = None
    waiting: int = WAITING
    lookup: Lookup = NO_LOOKUP


def serve(engine: Engine, options: Options, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve at a socket of `listen` until a signal ends it. `ready` gets one line once clients can connect."""
    usual = Sampling(), Sampling(temperature=1.0)
    tell(Step("keys and values", 0, None))
    sequences = options.sequences or fitting(engine)
    with Session(engine, sequences, options.waiting, usual, options.lookup) as session:
        tell(Step("first text", 0, None))
        for _ in session.stream([0], Sampling(max_new_tokens=WARM_UP)):
            pass
        freeze()
        listening.listen(CONNECTIONS)
        ready(describe(session, options, listening.getsockname()[1]))
        http = make_server(session, options)
        threading.Thread(target=prepare, args=(http.shared,), daemon=True).start()
        http.run([listening])


def freeze() -> None:
    """Take the objects so far out of garbage collection: a full one, of 400,000 that stay, holds every stream for 0.2
    s."""
    gc.collect()
    gc.freeze()


def prepare(server: Server) -> None:
    """Make what the first requests would wait for, and all others with one that wants log-probabilities: the bytes of
    tokens."""
    first_chat(server.engine)
    _ = server.vocabulary.masks


def first_chat(engine: Engine) -> None:
    """Start the process that renders conversations: 0.6 s of processor time that the first one would wait for."""
    with suppress(EngineError):  # without a template, or with one that refuses this
        engine.encode_chat([{"role": "user", "content": "a"}])


class HttpServer(uvicorn.Server):
    """An HTTP server that ends its session LAST_ANSWERS seconds after a signal, so that open answers end with an
    error."""

    def __init__(self, config: uvicorn.Config, shared: Server) -> None:
        super().__init__(config)
        self.shared = shared

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(LAST_ANSWERS, self.shared.session.end)
        await super().shutdown(sockets)
        timer.cancel()


def make_server(session: Session, options: Options) -> HttpServer:
    """An HTTP server over a session."""
    server = Server(session, options.name, options.defaults, Vocabulary(session.engine), Metrics(session))
    config = uvicorn.Config(
        make_app(server, Gate(options.keys)),
        http=Impatient,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_ANSWERS + LAST_BYTES,
    )
    return HttpServer(config, server)


def listen(host: str, port: int, keys: Collection[str] = ()) -> socket.socket:
    """A socket with this address. UsageError if it is taken, none of this machine's, or open to others without keys."""
    require_guard(host, keys)
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
        ) from error
    return found


def describe(session: Session, options: Options, port: int) -> str:
    """The address, the model, its context, the number of sequences and the memory."""
    engine, cache = session.engine, session.batch.reader().cache
    host = f"[{options.host}]" if ":" in options.host else options.host
    device = engine.decoder.weights.device
    if on_gpu(device):
        taken = f"{torch.cuda.memory_reserved(device) / 2**30:.1f} GiB on {device}"
    else:
        taken = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
    return (
        f"http://{host}:{port} serves {options.name}: {cache.batch} sequences of {engine.options.context} tokens, "
        f"{taken} of memory, {cache.nbytes / 2**30:.2f} GiB of it for keys and values"
    )


def fitting(engine: Engine) -> int:
    """The default number of sequences: as many as fit in the memory of a GPU, at most SEQUENCES."""
    device = engine.decoder.weights.device
    if not on_gpu(device):
        return SEQUENCES // 2
    free, count = ROOM * free_nbytes(device)[0], SEQUENCES
    while count > 1 and engine.spaces.cache_nbytes(count, engine.options.context) > free:
        count //= 2
    return count


def defaults_of(directory: Path) -> Sampling:
    """The settings that generation_config.json proposes; the protocol's temperature of 1 without any.

    CheckpointError for values that no sampling can have.
    """
    with open_checkpoint(directory).companions() as companions:
        path = companions / "generation_config.json"
        found = read_json(path) if path.exists() else {}
    settings = {name: found[name] for name in SETTINGS if isinstance(found.get(name), int | float)}
    try:
        return replace(Sampling(temperature=1.0), **settings)
    except EngineError as error:
        raise CheckpointError(f"{path}: {error}") from error
