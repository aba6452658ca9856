"""A server over a tiny model, on a port of its own, and clients for it."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from lowbit.engine.engine import Engine
from lowbit.serve.run import HttpServer, Options, listen, make_server
from lowbit.serve.session import Session
from tests.engine.make import tiny


@dataclass(frozen=True)
class Served:
    """A running server."""

    session: Session
    port: int
    client: openai.OpenAI
    server: HttpServer

    @property
    def model(self) -> Engine:
        return self.session.engine

    @contextmanager
    def asked(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request, as any program could send it."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
            yield connection.getresponse()

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of the answer to one request."""
        with self.asked(method, path, body, **headers) as answer:
            return answer.status, answer.read()


@contextmanager
def serving(model: Engine, sequences: int = 3, **options: Any) -> Iterator[Served]:
    """A server over `model` while the context is open."""
    with Session(model, sequences, options.get("waiting", 64)) as session:
        server = make_server(session, Options("tiny", **options))
        listening = listen("127.0.0.1", 0)
        listening.listen()
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        key = next(iter(options.get("keys", ())), "none")
        try:
            with openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60
            ) as client:
                yield Served(session, port, client, server)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="package")
def engine_of_tests(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("served"))[0]


@pytest.fixture(scope="package")
def served(engine_of_tests):
    with serving(engine_of_tests) as found:
        yield found
