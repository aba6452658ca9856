"""The server on a GPU: `python -m benchmarks.bench_serve --commit $(git rev-parse --short HEAD)`.

Rows in benchmarks/results/serve.jsonl, each written as soon as it is measured; `case` says of what:

    bare      the engine alone, `clients` sequences in a batch: median time per token
    session   one request without HTTP; `grammar` is what masks its tokens: none, one that allows everything, or a
              JSON schema that llguidance follows (with --tokenizer, a directory with a tokenizer of VOCABULARY tokens)
    clients   `clients` streams over HTTP that start together, by a process of their own, with prompts of `prompt`
              tokens: tokens a second of all, time between a stream's tokens, time to the first one
    stall     one stream, and a prompt of `prompt` tokens meanwhile: the longest time between the stream's tokens
    dialogue  TURNS turns of a conversation, each with NEW more tokens and NEW written ones: time to each turn's first
              token, beside that of a prompt of the same length that no slot holds
    start     seconds until `lowbit serve` is ready, with a checkpoint of these shapes in memory

Weights are random, and so are prompts.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import queue
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.bench_vllm import LLAMA_2_7B, write_model
from benchmarks.load_serve import answers
from benchmarks.measure import run_facts
from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options as EngineOptions
from lowbit.engine.sampling import Sampling
from lowbit.engine.shapes import SHAPES, random_weights
from lowbit.engine.speed import measure, read_rate
from lowbit.serve.grammar import SPACE, Grammar
from lowbit.serve.run import Options, listen, make_server
from lowbit.serve.session import Session

RESULTS = Path(__file__).with_name("results") / "serve.jsonl"
SHAPE, METHOD, DTYPE, VOCABULARY, CONTEXT = "llama2-7b", "w4", torch.float16, 49152, 4352
OUTPUT, REPEATS, SEQUENCES = 128, 3, 16
CLIENTS = ((1, 128), (4, 128), (8, 128), (16, 128), (1, 2048), (4, 2048))
LONG, LONG_TIMES = 4096, 6
TURNS, NEW, OPENING = 20, 50, 500
STARTS = 2
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "numbers": {"type": "array", "items": {"type": "number"}}},
    "required": ["numbers", "name"],
}
Row = dict[str, Any]


def random_engine() -> Engine:
    """An engine with random weights, and a word for each token, since streams consist of text."""
    architecture = replace(SHAPES[SHAPE], vocabulary=VOCABULARY)
    weights = random_weights(architecture, METHOD, torch.empty(0, dtype=DTYPE, device="cuda"))
    return Engine(Decoder(architecture, weights, CONTEXT), word_tokenizer(VOCABULARY), EngineOptions(CONTEXT))


def word_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the word w5 for token 5, and so on."""
    words = {f"w{token}": token for token in range(count)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))


def fresh(length: int) -> list[int]:
    """A prompt that no slot holds."""
    return [random.randrange(VOCABULARY) for _ in range(length)]


def ms(seconds: float) -> float:
    """Milliseconds, rounded."""
    return round(seconds * 1e3, 3)


async def tokens_of(port: int, prompt: list[int], output: int = OUTPUT) -> tuple[list[float], list[int]]:
    """Seconds from the request to each token of a stream, and the tokens."""
    body = {"model": "random", "prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True}
    begin, times, text = time.perf_counter(), [], ""
    async for status, data in answers(port, json.dumps(body | {"ignore_eos": True}).encode()):
        if status != 200:
            raise RuntimeError(f"{status}: {data}")
        times.append(time.perf_counter() - begin)
        text += data["choices"][0]["text"]
    return times, [int(word) for word in re.findall(r"w(\d+)", text)]


async def together(port: int, count: int, length: int) -> tuple[list[list[float]], float]:
    """The times of `count` streams that start together, and the seconds until the last one's end."""
    prompts = [fresh(length) for _ in range(count)]
    begin = time.perf_counter()
    found = await asyncio.gather(*(tokens_of(port, prompt) for prompt in prompts))
    return [times for times, _ in found], time.perf_counter() - begin


def clients_row(port: int, count: int, length: int) -> Row:
    """The row of one number of clients, after a run that is not counted."""
    asyncio.run(together(port, count, length))
    runs = [asyncio.run(together(port, count, length)) for _ in range(REPEATS)]
    streams = [times for found, _ in runs for times in found]
    gaps = sorted(b - a for times in streams for a, b in itertools.pairwise(times))
    return {
        "case": "clients",
        "clients": count,
        "prompt": length,
        "tokens_per_s": round(sum(map(len, streams)) / sum(seconds for _, seconds in runs), 1),
        "ms_between_median": ms(statistics.median(gaps)),
        "ms_between_p99": ms(gaps[int(0.99 * (len(gaps) - 1))]),
        "ms_between_most": ms(gaps[-1]),
        "ms_first_median": ms(statistics.median(times[0] for times in streams)),
        "tokens_a_stream": min(map(len, streams)),
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

    asyncio.run(turns())
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


def client_process(port: int, results: "multiprocessing.Queue[Row | None]") -> None:
    """The process of the clients: the rows that need HTTP, the most important ones first."""
    jobs: list[Callable[[], Row]] = [lambda case=case: clients_row(port, *case) for case in CLIENTS]
    for job in (jobs[0], lambda: stall_row(port), lambda: dialogue_row(port), *jobs[1:]):
        results.put(job())
    results.put(None)


class Anything:
    """A grammar that allows every token."""

    ended = False

    def fill(self, row: torch.Tensor) -> None:
        """Allow all."""
        row.fill_(-1)

    def take(self, token: int) -> None:
        """Nothing changes."""


def session_ms(session: Session, grammar: Any) -> float:
    """Median milliseconds between the tokens of one request, without HTTP."""
    times: list[float] = []
    done = threading.Event()

    def tell(job: Any, update: Any) -> None:
        times.append(time.perf_counter())
        if isinstance(update, Exception) or update.piece.finish_reason:
            done.set()

    for _ in range(2):
        times.clear()
        done.clear()
        requests = session.engine.requests([fresh(128)], None, max_new_tokens=OUTPUT, ignore_eos=True)
        session.submit(requests, tell, "", [] if grammar is None else [grammar()])
        if not done.wait(30):
            raise RuntimeError("a request in the session did not end")
    return ms(statistics.median(b - a for a, b in itertools.pairwise(times)))


def session_rows(session: Session, tokenizer: Path | None) -> Iterator[Row]:
    """Rows without HTTP, with and without masks."""
    grammars: dict[str, Any] = {"none": None, "anything": Anything}
    if tokenizer is not None:
        read = from_tokenizer(AutoTokenizer.from_pretrained(tokenizer), VOCABULARY)
        source = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides=SPACE)
        grammars["json_schema"] = lambda: Grammar(LLMatcher(read, source, log_level=0))
    for name, grammar in grammars.items():
        yield {
            "case": "session",
            "clients": 1,
            "prompt": 128,
            "grammar": name,
            "ms_between_median": session_ms(session, grammar),
        }


@contextmanager
def served(session: Session) -> Iterator[int]:
    """The port of an HTTP server over a session."""
    with listen("127.0.0.1", 0) as listening:
        listening.listen()
        server = make_server(session, Options("random"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


def http_rows(session: Session) -> Iterator[Row]:
    """Rows of the client process."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Row | None] = context.Queue()
    with served(session) as port:
        process = context.Process(target=client_process, args=(port, results), daemon=True)
        process.start()
        while True:
            try:
                row = results.get(timeout=5)
            except queue.Empty:
                if process.is_alive():
                    continue
                raise RuntimeError(f"the clients ended with {process.exitcode}") from None
            if row is None:
                return
            yield row


def engine_rows(tokenizer: Path | None) -> Iterator[Row]:
    """Rows of one engine, in this process and over HTTP."""
    engine = random_engine()
    rate = read_rate(torch.device("cuda"))
    for batch in (1, 4, 8, 16):
        found = measure(engine, batch, 128, OUTPUT, rate)
        yield {"case": "bare", "clients": batch, "prompt": 128, "ms_between_median": round(found.ms_per_token, 3)}
    with Session(engine, SEQUENCES, usual=(Sampling(),)) as session:
        yield from session_rows(session, tokenizer)
        yield from http_rows(session)


def start_rows() -> Iterator[Row]:
    """Seconds from a command to its ready line, for a checkpoint in memory; the first time Python's files are read."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        directory = Path(place) / "model"
        write_model(directory, METHOD)
        word_tokenizer(LLAMA_2_7B.vocabulary).save_pretrained(directory)
        torch.cuda.empty_cache()
        command = [sys.executable, "-c", "from lowbit.commands.lowbit import main; main()", "serve", str(directory)]
        for number in range(STARTS):
            begin = time.perf_counter()
            server = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
            try:
                assert server.stdout is not None
                line = server.stdout.readline().strip()
                seconds = time.perf_counter() - begin
            finally:
                server.kill()
                server.wait(20)
            if " serves " not in line:
                raise RuntimeError(f"no server came up: {line!r}")
            yield {"case": "start", "number": number, "seconds": round(seconds, 2), "ready": line}


def main() -> None:
    """Measures all cases, or those of --only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--only", choices=("engine", "start"))
    options = parser.parse_args()
    facts = {"shape": SHAPE, "method": METHOD, "dtype": "float16"} | run_facts(options.commit)
    parts = {"engine": lambda: engine_rows(options.tokenizer), "start": start_rows}
    with options.output.open("a") as file:
        for name, rows in parts.items():
            for row in rows() if options.only in (None, name) else ():
                print(json.dumps(row), flush=True)
                file.write(json.dumps(row | facts) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
