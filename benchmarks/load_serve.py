"""A server of the demo model under load: `python -m benchmarks.load_serve --minutes 30 --clients 16`.

The clients ask for texts, whole and as streams, and for one of several texts by a grammar, go away in the middle, read
slowly, and send bodies that cannot be served. Every whole text is compared with that of the engine alone, and so is its
number of tokens. Half way the server is killed, and another one takes its address. Prints counts, and the memory of
both servers after a fifth of their time and at its end. Exit status 1 if a text differs, a request that should be
served fails, memory grew by more than GROWTH, or the killed server left a process behind.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.serve_clients import answers
from lowbit import engine
from lowbit.engine.sampling import Sampling

TEXTS = (
    "Once upon a time",
    "The capital of France is",
    "def add(a, b):",
    "A list of fruits:\n1.",
    "Water is",
    "In 1969",
)
SETTINGS = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"temperature": 0, "presence_penalty": 1},
)
TOKENS = 24
BAD = (
    (b"{", 400),
    (b'{"model": "demo", "prompt": "a", "temperature": NaN}', 400),
    (b'{"model": "other", "prompt": "a"}', 404),
    (b'{"model": "demo", "prompt": "a", "max_tokens": -1}', 400),
    (b'{"model": "demo", "prompt": [' + b"1," * 9000 + b"1]}", 400),
    (b"\xff\xfe" * 100, 400),
    (b"[" * 5000, 400),
    (b" " * (3 << 20), 413),
)
GROWTH = 0.02  # of the server's memory
LEAVE = 60  # seconds for the children of a killed server to end: 10 were too few at the lowest priority
END = 120  # seconds for a server to end, on a machine with other work


CHOICES = ("yes", "no", "maybe so", "\u00e4hm")
Expected = dict[tuple[int, int], tuple[str, int]]


class Server:
    """A server in a process of its own. Another one can follow it at the same port."""

    def __init__(self) -> None:
        self.port, self.lives = 0, 0
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        """A new process, which is ready."""
        arguments = ["serve", "demo", "--port", str(self.port), "--context", "1024", "--queue", "32", "--quiet"]
        command = [sys.executable, "-c", "from lowbit.commands.lowbit import main; main()", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+) serves", line)
        if found is None:
            raise RuntimeError(f"no server came up: {line!r}")
        self.port = int(found[1])
        self.lives += 1
        return process

    def replace(self) -> list[psutil.Process]:
        """Kill the process and start another one. Children of the killed one that live on after LEAVE seconds: they
        end when they find their pipes closed, which takes a while."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(20)
        _, left = psutil.wait_procs(children, LEAVE)
        self.process = self.start()
        return left

    def nbytes(self) -> int:
        """Resident memory."""
        return psutil.Process(self.process.pid).memory_info().rss

    def end(self) -> None:
        """End the process as a service manager does."""
        self.process.terminate()
        self.process.wait(END)


@dataclass
class Load:
    """One run. `expected` has the text of each (prompt, settings) alone, and its number of tokens."""

    server: Server
    seed: int
    expected: Expected
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    async def client(self, until: float) -> None:
        """Requests one after another, drawn at random."""
        acts = [self.text] * 6 + [self.leave] * 2 + [self.bad, self.slow, self.choice]
        while time.monotonic() < until:
            life = self.server.lives
            try:
                await self.random.choice(acts)()
            except (ConnectionError, IndexError, asyncio.IncompleteReadError) as error:
                await self.cut(life, repr(error))

    async def cut(self, life: int, text: str) -> None:
        """Count an answer that broke off. It is wrong unless the server was killed meanwhile."""
        await asyncio.sleep(1)
        if life == self.server.lives and self.server.process.poll() is None:
            self.wrong.append(f"an answer broke off: {text}")
        self.counts["cut"] += 1

    def draw(self) -> tuple[tuple[int, int], dict]:
        """A prompt with settings, and the body that asks for its text."""
        at = self.random.randrange(len(TEXTS)), self.random.randrange(len(SETTINGS))
        body = {"model": "demo", "prompt": TEXTS[at[0]], "max_tokens": TOKENS} | SETTINGS[at[1]]
        if self.random.random() < 0.7:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return at, body

    async def asked(self, body: dict, pause: float = 0.0) -> tuple[int, str, int] | None:
        """Status, text and number of tokens of an answer. None if it broke off, or if the queue was full."""
        status, text, written, life, reason = 0, "", -1, self.server.lives, None
        async for found, data in answers(self.server.port, json.dumps(body).encode()):
            status = found
            for choice in data.get("choices", ()):
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            written = (data.get("usage") or {}).get("completion_tokens", written)
            await asyncio.sleep(pause)
        self.counts[f"status {status}"] += 1
        if status == 429:
            await asyncio.sleep(0.5)
            return None
        if status == 0 or (status == 200 and (reason is None or written < 0)):
            await self.cut(life, text)
            return None
        return status, text, written

    async def text(self, pause: float = 0.0) -> None:
        """A text, compared with the engine's."""
        at, body = self.draw()
        got = await self.asked(body, pause)
        if got is not None and got != (200, *self.expected[at]):
            self.wrong.append(f"{body}: {got}, alone {self.expected[at]}")

    async def slow(self) -> None:
        """A text read slowly."""
        self.counts["slow"] += 1
        await self.text(pause=0.2)

    async def choice(self) -> None:
        """One of several texts, by a grammar."""
        self.counts["choice"] += 1
        body = self.draw()[1] | {"structured_outputs": {"choice": CHOICES}}
        got = await self.asked(body)
        if got is not None and (got[0] != 200 or got[1] not in CHOICES):
            self.wrong.append(f"{body}: {got}")

    async def leave(self) -> None:
        """A request whose client goes away after a while."""
        _, body = self.draw()
        self.counts["left"] += 1
        reading = asyncio.ensure_future(drain(self.server.port, json.dumps(body | {"n": 2}).encode()))
        await asyncio.wait({reading}, timeout=self.random.random() * 2)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def bad(self) -> None:
        """A request that cannot be served."""
        body, wanted = self.random.choice(BAD)
        self.counts["bad"] += 1
        status, life = 0, self.server.lives
        try:
            async for found, _ in answers(self.server.port, body):
                status = found
        except ConnectionError:  # the server closed before it read all of a large body
            status = wanted if wanted == 413 else 0
        if status == 0:
            await self.cut(life, f"{body[:60]!r}")
        elif status != wanted:
            self.wrong.append(f"{status} for {body[:60]!r}, {wanted} was due")


async def drain(port: int, body: bytes) -> None:
    """Read an answer and drop it."""
    async for _ in answers(port, body):
        pass


async def run(load: Load, clients: int, seconds: float) -> list[tuple[int, int]]:
    """Bytes of each server after a fifth of its time, and at its end."""
    until, found = time.monotonic() + seconds, []
    tasks = [asyncio.ensure_future(load.client(until)) for _ in range(clients)]
    for last in (False, True):
        end = until if last else time.monotonic() + seconds / 2
        await asyncio.sleep((end - time.monotonic()) / 5)
        early = load.server.nbytes()
        await asyncio.sleep(end - time.monotonic())
        found.append((early, load.server.nbytes()))
        print(f"{dict(load.counts)}; {len(load.wrong)} wrong; bytes {found}", flush=True)
        if not last:
            left = await asyncio.to_thread(load.server.replace)
            load.wrong += [f"the killed server left {process}" for process in left]
    await asyncio.gather(*tasks)
    return found


def texts_alone() -> Expected:
    """Each text and its number of tokens, by the engine without a server."""
    model, found = engine.load("demo", "cpu", context=1024), {}
    for p, text in enumerate(TEXTS):
        for s, settings in enumerate(SETTINGS):
            [done] = model.generate([text], Sampling(max_new_tokens=TOKENS), **settings)
            found[p, s] = done.text, len(done.tokens)
    return found


def main() -> None:
    """One run over servers of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, help="append a row to this file")
    options = parser.parse_args()
    expected, server = texts_alone(), Server()
    try:
        load = Load(server, options.seed, expected)
        memory = asyncio.run(run(load, options.clients, 60 * options.minutes))
    finally:
        server.end()
    for line in load.wrong[:10]:
        print(line)
    mib = [[early >> 20, late >> 20] for early, late in memory]
    row = {"case": "load", "clients": options.clients, "minutes": options.minutes, "counts": dict(load.counts)}
    row |= {"wrong": len(load.wrong), "memory_mib": mib, "machine": f"{os.cpu_count()} CPU cores"}
    row |= {"load_average": os.getloadavg()[2], "commit": options.commit, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    print(json.dumps(row))
    if options.output is not None:
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    grew = any(late > early * (1 + GROWTH) for early, late in memory)
    raise SystemExit(1 if load.wrong or grew else 0)


if __name__ == "__main__":
    main()
