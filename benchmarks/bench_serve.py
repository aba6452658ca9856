"""The server on a GPU: `python -m benchmarks.bench_serve --commit $(git rev-parse --short HEAD)`.

Rows in benchmarks/results/serve.jsonl, each written as soon as it is measured; `case` says of what:

    bare      the engine alone, `clients` sequences in a batch: median time per token
    session   one request without HTTP; `grammar` is what masks its tokens: none, one that allows everything, or a
              JSON schema that llguidance follows (with --tokenizer, a directory with a tokenizer of VOCABULARY tokens)
    clients   `clients` streams over HTTP that start together, by serve_clients.py, with prompts of `prompt` tokens:
              tokens a second of all, time between a stream's tokens, time to the first one
    stall     one stream, and a prompt of `prompt` tokens meanwhile: the longest time between the stream's tokens
    dialogue  TURNS turns of a conversation, each with NEW more tokens and NEW written ones: time to each turn's first
              token, beside that of a prompt of the same length that no slot holds
    start     seconds until `lowbit serve` is ready, with a checkpoint of these shapes in memory
    start_generate  seconds from a command, `lowbit generate`, to its first token

Weights are random, and so are prompts.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
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
from benchmarks.measure import run_facts
from benchmarks.serve_clients import OUTPUT, Row, ms
from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options as EngineOptions
from lowbit.engine.sampling import Sampling
from lowbit.engine.shapes import SHAPES, random_weights
from lowbit.engine.speed import measure, read_rate
from lowbit.serve.grammar import SPACE, Grammar
from lowbit.serve.run import Options, freeze, listen, make_server
from lowbit.serve.session import Session

RESULTS = Path(__file__).with_name("results") / "serve.jsonl"
SHAPE, METHOD, DTYPE, VOCABULARY, CONTEXT = "llama2-7b", "w4", torch.float16, 49152, 4352
DEVICE, SEQUENCES, STARTS = "cuda", 16, 3
STAGE = re.compile(r"([a-z ]+) ([\d.]+)(?:,|$)")  # in the server's log
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "numbers": {"type": "array", "items": {"type": "number"}}},
    "required": ["numbers", "name"],
}


def random_engine() -> Engine:
    """An engine with random weights, and a word for each token, since streams consist of text."""
    architecture = replace(SHAPES[SHAPE], vocabulary=VOCABULARY)
    weights = random_weights(architecture, METHOD, torch.empty(0, dtype=DTYPE, device=DEVICE))
    return Engine(Decoder(architecture, weights, CONTEXT), word_tokenizer(VOCABULARY), EngineOptions(CONTEXT))


def word_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the word w5 for token 5, and so on."""
    words = {f"w{token}": token for token in range(count)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))


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
        requests = session.engine.requests([list(range(128))], None, max_new_tokens=OUTPUT, ignore_eos=True)
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
    """Rows of the clients, a process of their own, once all expected graphs are captured."""
    while session.batch.cold:
        time.sleep(0.05)
    freeze()
    with served(session) as port:
        command = [sys.executable, "-m", "benchmarks.serve_clients", str(port), str(VOCABULARY)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as clients:
            assert clients.stdout is not None
            try:
                for line in clients.stdout:
                    yield json.loads(line)
            finally:
                clients.kill()
    if clients.wait() > 0:
        raise RuntimeError(f"the clients ended with {clients.returncode}")


def engine_rows(tokenizer: Path | None) -> Iterator[Row]:
    """Rows of one engine, in this process and over HTTP."""
    engine = random_engine()
    rate = read_rate(torch.device(DEVICE))
    yield bare_row(engine, 1, rate)
    with Session(engine, SEQUENCES, usual=(Sampling(),)) as session:
        yield from http_rows(session)
        yield from session_rows(session, tokenizer)
    for batch in (1, 4, 8, 16):
        yield bare_row(engine, batch, rate)


def bare_row(engine: Engine, batch: int, rate: float) -> Row:
    """The engine's own time per token. The first batch is measured at both ends of a run."""
    found = measure(engine, batch, 128, OUTPUT, rate)
    return {"case": "bare", "clients": batch, "prompt": 128, "ms_between_median": round(found.ms_per_token, 3)}


def start_rows() -> Iterator[Row]:
    """Seconds from a command to its ready line, for a checkpoint in memory; the first time Python's files are read."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        directory = Path(place) / "model"
        write_model(directory, METHOD)
        word_tokenizer(LLAMA_2_7B.vocabulary).save_pretrained(directory)
        torch.cuda.empty_cache()
        for number in range(STARTS):
            yield start_row(directory, number)
        for number in range(STARTS):
            yield first_token_row(directory, number)


def start_row(directory: Path, number: int) -> Row:
    """The row of one start, ended with the ready line: `stages` are seconds, by the server's own log."""
    command = [sys.executable, "-c", "from lowbit.commands.lowbit import main; main()", "serve", str(directory)]
    begin = time.perf_counter()
    server = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline().strip()
        seconds = time.perf_counter() - begin
    finally:
        server.kill()
        _, log = server.communicate(timeout=20)
    if " serves " not in line:
        raise RuntimeError(f"no server came up: {line!r} {log}")
    stages = {name.strip(): float(value) for name, value in STAGE.findall(log.partition("ready after ")[2])}
    found = {"number": number, "seconds": round(seconds, 2), "stages": stages, "ready": line}
    return {"case": "start"} | found | {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}


def first_token_row(directory: Path, number: int) -> Row:
    """The row of one text, ended with its first character."""
    command = [sys.executable, "-u", "-c", "from lowbit.commands.lowbit import main; main()", "generate"]
    command += [str(directory), "-p", "w5 w6 w7", "--max-new-tokens", "1", "--stream"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        got = writer.stdout.read(1)
        seconds = time.perf_counter() - begin
    if not got:
        raise RuntimeError("no text was written")
    return {"case": "start_generate", "number": number, "seconds": round(seconds, 2)}


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
