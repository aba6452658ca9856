"""The server on a GPU: `python -m benchmarks.bench_serve --commit $(git rev-parse --short HEAD)`.

One row per case in benchmarks/results/serve.jsonl: clients at a time, tokens of their prompts, tokens per second of all
together, median and 99th percentile of the time between a stream's tokens, and median time to the first token. Clients
run in a process of their own and read streams over HTTP. The row of 0 clients is the engine's own time per token, in
the same process; `masked` rows have a grammar that allows everything. Weights are random, and so are prompts.
"""

import asyncio
import itertools
import json
import multiprocessing
import random
import statistics
import threading
import time
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.bench_decode import Case, engine_of
from benchmarks.load_serve import answers
from benchmarks.measure import Floor, arguments, run_facts
from lowbit.engine.engine import Engine
from lowbit.engine.speed import measure
from lowbit.serve.run import Options, listen, make_server
from lowbit.serve.session import Session

RESULTS = Path(__file__).with_name("results") / "serve.jsonl"
CASE = Case("llama2-7b", "w4", (1,), prompts=(4096,))
OUTPUT = 128
CLIENTS = ((1, 128), (4, 128), (16, 128), (1, 2048), (4, 2048))
REPEATS = 3


def with_tokenizer(engine: Engine) -> Engine:
    """The engine with a word for each token, since streams consist of text."""
    words = {f"w{token}": token for token in range(engine.decoder.architecture.vocabulary)}
    engine.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))
    return engine


async def one(port: int, prompt: list[int]) -> list[float]:
    """Seconds from the request to each token of a stream."""
    body = {"model": "random", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "stream": True}
    begin, times = time.perf_counter(), []
    async for _ in answers(port, json.dumps(body | {"ignore_eos": True}).encode()):
        times.append(time.perf_counter() - begin)
    return times


async def several(port: int, count: int, length: int) -> tuple[list[list[float]], float]:
    """The times of `count` streams that start together, and the seconds until the last one's end."""
    prompts = [[random.randrange(32000) for _ in range(length)] for _ in range(count)]
    begin = time.perf_counter()
    times = await asyncio.gather(*(one(port, prompt) for prompt in prompts))
    return times, time.perf_counter() - begin


def clients(port: int, results: multiprocessing.Queue) -> None:
    """The process of the clients: rows of all cases, each after one run that is not counted."""
    for count, length in CLIENTS:
        asyncio.run(several(port, count, length))
        runs = [asyncio.run(several(port, count, length)) for _ in range(REPEATS)]
        streams = [times for found, _ in runs for times in found]
        gaps = sorted(b - a for times in streams for a, b in itertools.pairwise(times))
        results.put(
            {
                "clients": count,
                "prompt": length,
                "tokens_per_s": round(sum(map(len, streams)) / sum(seconds for _, seconds in runs), 1),
                "ms_between_median": round(statistics.median(gaps) * 1e3, 3),
                "ms_between_p99": round(gaps[int(0.99 * (len(gaps) - 1))] * 1e3, 3),
                "ms_first_median": round(statistics.median(times[0] for times in streams) * 1e3, 2),
                "tokens_a_stream": min(map(len, streams)),
            }
        )
    results.put(None)


class Anything:
    """A grammar that allows every token."""

    ended = False

    def fill(self, row) -> None:
        """Allow all."""
        row.fill_(-1)

    def take(self, token: int) -> None:
        """Nothing changes."""


def ms_in_session(session: Session, masked: bool) -> float:
    """Median milliseconds between the tokens of one request, without HTTP."""
    times, done = [], threading.Event()

    def tell(job, update) -> None:
        times.append(time.perf_counter())
        if update.piece.finish_reason:
            done.set()

    for _ in range(2):
        times.clear()
        done.clear()
        settings = {"max_new_tokens": OUTPUT, "ignore_eos": True}
        session.submit(session.engine.requests([[1] * 128], None, **settings), tell, "", [Anything()] if masked else ())
        done.wait()
    return round(statistics.median(b - a for a, b in itertools.pairwise(times)) * 1e3, 3)


def main() -> None:
    """Measures CLIENTS."""
    options = arguments(__doc__, RESULTS)
    facts, engine = run_facts(options.commit), with_tokenizer(engine_of(CASE))
    named = {"shape": CASE.shape, "method": CASE.method, "dtype": CASE.dtype}
    rows = [{"clients": 0, "prompt": 128, "ms_between_median": measure(engine, 1, 128, OUTPUT, ceiling()).ms_per_token}]
    with Session(engine, sequences=16) as session, listen("127.0.0.1", 0) as listening:
        for masked in (False, True):
            found = ms_in_session(session, masked)
            rows.append({"clients": 1, "prompt": 128, "http": False, "masked": masked, "ms_between_median": found})
        listening.listen()
        server = make_server(session, Options("random"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=clients, args=(listening.getsockname()[1], results), daemon=True)
        process.start()
        while (row := results.get(timeout=300)) is not None:
            rows.append(row)
            print(json.dumps(row), flush=True)
        server.should_exit = True
        thread.join(10)
    with options.output.open("a") as file:
        for row in rows:
            print(json.dumps(row))
            file.write(json.dumps(named | row | facts) + "\n")


def ceiling() -> float:
    """The read ceiling in GB/s, which `measure` takes."""
    return Floor().read_ceiling_gbs()


if __name__ == "__main__":
    main()
