"""Clients of a server of random weights: `python -m benchmarks.serve_clients PORT VOCABULARY [CASE ...]` prints a row a
line.

They import the standard library alone, and so start at once; bench_serve.py says what the rows are.
"""

import asyncio
import itertools
import json
import random
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

VOCABULARY = int(sys.argv[2]) if __name__ == "__main__" else 0
OUTPUT, REPEATS = 128, 3
CLIENTS = ((1, 128), (4, 128), (8, 128), (16, 128), (1, 2048), (4, 2048))
LONG, LONG_TIMES = 4096, 11
TURNS, NEW, OPENING = 20, 50, 500
FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "penalty": {"frequency_penalty": 0.5},
    "logprobs": {"logprobs": 5},
    "logprobs and penalty": {"logprobs": 5, "frequency_penalty": 0.5},
}
Row = dict[str, Any]
Job = Callable[[], Iterable[Row]]


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


def fresh(length: int) -> list[int]:
    """A prompt that no slot holds."""
    return [random.randrange(VOCABULARY) for _ in range(length)]


def ms(seconds: float) -> float:
    """Milliseconds, rounded."""
    return round(seconds * 1e3, 3)


async def tokens_of(
    port: int, prompt: list[int], output: int = OUTPUT, **settings: Any
) -> tuple[list[float], list[int]]:
    """Seconds from the request to each token of a stream, and the tokens."""
    body = {"model": "random", "prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True}
    begin, times, text = time.perf_counter(), [], ""
    async for status, data in answers(port, json.dumps(body | {"ignore_eos": True} | settings).encode()):
        if status != 200:
            raise RuntimeError(f"{status}: {data}")
        times.append(time.perf_counter() - begin)
        text += data["choices"][0]["text"]
    return times, [int(word) for word in re.findall(r"w(\d+)", text)]


async def together(port: int, count: int, length: int) -> tuple[list[tuple[list[float], list[int]]], float]:
    """The times and tokens of `count` streams that start together, and the seconds until the last one's end."""
    prompts = [fresh(length) for _ in range(count)]
    begin = time.perf_counter()
    found = await asyncio.gather(*(tokens_of(port, prompt) for prompt in prompts))
    return found, time.perf_counter() - begin


def clients_row(port: int, count: int, length: int) -> Row:
    """The row of one number of clients, after a run that is not counted. An event may have several tokens."""
    asyncio.run(together(port, count, length))
    runs = [asyncio.run(together(port, count, length)) for _ in range(REPEATS)]
    streams = [stream for found, _ in runs for stream in found]
    gaps = sorted(b - a for times, _ in streams for a, b in itertools.pairwise(times))
    return {
        "case": "clients",
        "clients": count,
        "prompt": length,
        "tokens_per_s": round(sum(len(tokens) for _, tokens in streams) / sum(seconds for _, seconds in runs), 1),
        "ms_between_median": ms(statistics.median(gaps)),
        "ms_between_p99": ms(gaps[int(0.99 * (len(gaps) - 1))]),
        "ms_between_most": ms(gaps[-1]),
        "ms_first_median": ms(statistics.median(times[0] for times, _ in streams)),
        "tokens_a_stream": min(len(tokens) for _, tokens in streams),
        "events_a_stream": min(len(times) for times, _ in streams),
    }


def stall_row(port: int) -> Row:
    """The longest time between a stream's tokens while a long prompt is read, each time of a new one."""

    async def once() -> tuple[float, float]:
        stream = asyncio.ensure_future(tokens_of(port, fresh(16), 400))
        await asyncio.sleep(0.2)
        begin = time.perf_counter()
        await tokens_of(port, fresh(LONG), 1)
        taken = time.perf_counter() - begin
        times, _ = await stream
        return max(b - a for a, b in itertools.pairwise(times)), taken

    found = [asyncio.run(once()) for _ in range(LONG_TIMES)]
    gaps = [ms(gap) for gap, _ in found]
    return {
        "case": "stall",
        "clients": 2,
        "prompt": LONG,
        "ms_between_most_first": gaps[0],
        "ms_between_most": max(gaps[1:]),
        "ms_between_most_median": statistics.median(gaps[1:]),
        "ms_first_median": ms(statistics.median(taken for _, taken in found[1:])),
    }


def feature_rows(port: int) -> Iterator[Row]:
    """For each of FEATURES the longest time between the tokens of a greedy stream while a request with it comes and
    goes: the first such request, and the most with later ones. A feature that the server refuses is said."""

    async def once(settings: dict[str, Any]) -> tuple[float, float]:
        stream = asyncio.ensure_future(tokens_of(port, fresh(16), 300))
        await asyncio.sleep(0.15)
        taken, _ = await tokens_of(port, fresh(16), 16, **settings)
        times, _ = await stream
        return max(b - a for a, b in itertools.pairwise(times)), taken[0]

    for name, settings in FEATURES.items():
        try:
            found = [asyncio.run(once(settings)) for _ in range(1 + REPEATS)]
        except RuntimeError as error:
            yield {"case": "feature", "feature": name, "refused": str(error)[:200]}
            continue
        gaps, firsts = ([ms(pair[part]) for pair in found] for part in (0, 1))
        yield {
            "case": "feature",
            "feature": name,
            "clients": 2,
            "ms_between_most_first": gaps[0],
            "ms_between_most": max(gaps[1:]),
            "ms_first_first": firsts[0],
            "ms_first_median": statistics.median(firsts[1:]),
        }


def dialogue_row(port: int) -> Row:
    """The time to the first token of each turn, and of prompts that have as many tokens."""

    async def turns() -> tuple[list[float], list[float]]:
        history, ours, whole = fresh(OPENING), [], []
        for _ in range(TURNS):
            history += fresh(NEW)
            times, written = await tokens_of(port, history, NEW)
            ours.append(ms(times[0]))
            whole.append(ms((await tokens_of(port, fresh(len(history)), 1))[0][0]))
            history += written
        return ours, whole

    ours, whole = asyncio.run(turns())
    return {
        "case": "dialogue",
        "clients": 1,
        "turns": TURNS,
        "new": NEW,
        "ms_first_all": round(sum(ours), 1),
        "ms_first_all_fresh": round(sum(whole), 1),
        "ms_first": ours,
        "ms_first_fresh": whole,
    }


def main() -> None:
    """All rows, the most important ones first; those of the named cases, if some are named."""
    port, named = int(sys.argv[1]), sys.argv[3:]
    clients: list[Job] = [lambda case=case: [clients_row(port, *case)] for case in CLIENTS]
    others: list[tuple[str, Job]] = [
        ("stall", lambda: [stall_row(port)]),
        ("dialogue", lambda: [dialogue_row(port)]),
        ("feature", lambda: feature_rows(port)),
    ]
    first, *rest = [("clients", clients[i]) for i in (0, 4, 3, 2, 1, 5)]
    order = [first, *rest, *others] if named else [*others[:2], first, *rest]
    for name, job in order:
        if not named or name in named:
            for row in job():
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
