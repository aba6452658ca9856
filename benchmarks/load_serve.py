"""A server of the demo model under load: `python -m benchmarks.load_serve --minutes 30 --clients 16`.

The clients ask for texts, whole and as streams, go away in the middle, read slowly, and send bodies that cannot be
served. Every whole text is compared with that of the engine alone. Prints counts, and the server's memory after a fifth
of the time and at the end. Exit status 1 if a text differs, a request that should be served fails, or memory grew.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import psutil

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


@dataclass
class Load:
    """One run. `expected` has the text of each (prompt, settings) alone."""

    port: int
    seed: int
    expected: dict[tuple[int, int], str]
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    async def client(self, until: float) -> None:
        """Requests one after another, drawn at random."""
        acts = [self.text] * 6 + [self.leave] * 2 + [self.bad, self.slow]
        while time.monotonic() < until:
            await self.random.choice(acts)()

    def draw(self) -> tuple[tuple[int, int], dict]:
        """A prompt with settings, and the body that asks for its text."""
        at = self.random.randrange(len(TEXTS)), self.random.randrange(len(SETTINGS))
        body = {"model": "demo", "prompt": TEXTS[at[0]], "max_tokens": TOKENS, "stream": self.random.random() < 0.7}
        return at, body | SETTINGS[at[1]]

    async def text(self, pause: float = 0.0) -> None:
        """A text, compared with the engine's."""
        at, body = self.draw()
        status, got = 0, ""
        async for found, data in answers(self.port, json.dumps(body).encode()):
            status = found
            if data.get("choices"):
                got += data["choices"][0]["text"]
            await asyncio.sleep(pause)
        self.counts[f"status {status}"] += 1
        if status == 429:
            await asyncio.sleep(0.5)
        elif status != 200 or got != self.expected[at]:
            self.wrong.append(f"{status} {body}: {got!r}, alone {self.expected[at]!r}")

    async def slow(self) -> None:
        """A text read slowly."""
        self.counts["slow"] += 1
        await self.text(pause=0.2)

    async def leave(self) -> None:
        """A request whose client goes away after a while."""
        _, body = self.draw()
        self.counts["left"] += 1
        reading = asyncio.ensure_future(drain(self.port, json.dumps(body | {"n": 2}).encode()))
        await asyncio.wait({reading}, timeout=self.random.random() * 2)
        reading.cancel()

    async def bad(self) -> None:
        """A request that cannot be served."""
        body, wanted = self.random.choice(BAD)
        self.counts["bad"] += 1
        status = 0
        try:
            async for found, _ in answers(self.port, body):
                status = found
        except ConnectionError:  # the server closed before it read all of a large body
            status = wanted if wanted == 413 else 0
        if status != wanted:
            self.wrong.append(f"{status} for {body[:60]!r}, {wanted} was due")


async def answers(port: int, body: bytes) -> AsyncIterator[tuple[int, dict]]:
    """Status and JSON of each event of a stream, or of the one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        async for line in reader:
            found = re.match(rb"(?:data: )?(\{.*\})\s*$", line)
            if found:
                yield status, json.loads(found[1])
    finally:
        writer.close()


async def drain(port: int, body: bytes) -> None:
    """Read an answer and drop it."""
    async for _ in answers(port, body):
        pass


async def run(load: Load, clients: int, seconds: float, server: psutil.Process) -> tuple[int, int]:
    """Bytes of the server after a fifth of the time and at the end."""
    until = time.monotonic() + seconds
    tasks = [asyncio.ensure_future(load.client(until)) for _ in range(clients)]
    await asyncio.sleep(seconds / 5)
    early = server.memory_info().rss
    await asyncio.gather(*tasks)
    return early, server.memory_info().rss


def main() -> None:
    """One run over a server of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = "from lowbit.commands.lowbit import main; main()"
    arguments = ["serve", "demo", "--port", "0", "--context", "1024", "--queue", "32", "--quiet"]
    server = subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(re.search(r":(\d+) serves", server.stdout.readline())[1])
        model = engine.load("demo", "cpu", context=1024)
        expected = {
            (p, s): model.generate([text], Sampling(max_new_tokens=TOKENS), **settings)[0].text
            for p, text in enumerate(TEXTS)
            for s, settings in enumerate(SETTINGS)
        }
        load = Load(port, options.seed, expected)
        early, late = asyncio.run(run(load, options.clients, 60 * options.minutes, psutil.Process(server.pid)))
    finally:
        server.terminate()
        server.wait(20)
    for line in load.wrong[:10]:
        print(line)
    print(f"{dict(load.counts)}; {len(load.wrong)} wrong; memory {early >> 20} to {late >> 20} MiB")
    raise SystemExit(1 if load.wrong or late > early * (1 + GROWTH) else 0)


if __name__ == "__main__":
    main()
