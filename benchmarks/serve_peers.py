"""`lowbit serve` beside `vllm serve` of one checkpoint, one after another on one GPU:

    python -m benchmarks.serve_peers --commit $(git rev-parse --short HEAD) [SERVER ...]

SERVER is a name of SERVERS; default: all. A checkpoint of Llama-2-7B's shapes with random codes is written first, in
bfloat16 with 4 bits in groups of 128. Each server has room for SEQUENCES sequences of CONTEXT tokens, else what it has
by default, and SETTLED seconds without requests after its start. Rows in benchmarks/results/serve.jsonl, each with its
`server`: `peer_start`, the seconds from the command until /health answers, and those of serve_clients.py as
`peer_clients`, `peer_stall`, `peer_feature` and `peer_dialogue`. Before the first server `lowbit bench` measures the
engine alone on the same checkpoint, as `peer_bench`.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.bench_serve import RESULTS, word_tokenizer
from benchmarks.bench_vllm import LLAMA_2_7B, write_model
from benchmarks.measure import run_facts
from benchmarks.serve_clients import Row
from lowbit.serve.run import listen

CONTEXT, SEQUENCES = 4352, 16
METHOD = "w4"
LIMIT = 240  # seconds until a server has to answer
SETTLED = 8
CASES = ("clients", "stall", "feature", "dialogue")
BENCH = ("--batch", "1", "--batch", "4", "--batch", "16", "--prompt-tokens", "128", "--prompt-tokens", "2048")
LOWBIT = (sys.executable, "-c", "from lowbit.commands.lowbit import main; main()")


@dataclass(frozen=True)
class Server:
    """A program that serves.

    arguments    of its command, behind the checkpoint
    environment  variables of its own
    peer         True if it is vLLM
    """

    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    peer: bool = True


OURS = ("--name", "random", "--context", str(CONTEXT), "--max-sequences", str(SEQUENCES), "--quiet")
CACHE_GIB = 34  # of keys and values, for all positions
THEIRS = (
    *("--served-model-name", "random", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(SEQUENCES)),
    *("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(CACHE_GIB << 30)),
)
SERVERS = {
    "lowbit": Server(OURS, peer=False),
    "vllm": Server(THEIRS),
    "vllm marlin": Server(THEIRS, (("VLLM_DISABLED_KERNELS", "MacheteLinearKernel"),)),
    "vllm lowbit": Server((*THEIRS, "--quantization", "lowbit")),
}


def written(directory: Path) -> int:
    """The vocabulary of a checkpoint in `directory`, which is written if it is not there."""
    if not (directory / "config.json").exists():
        write_model(directory, METHOD, replace(LLAMA_2_7B, positions=2 * CONTEXT))
        word_tokenizer(LLAMA_2_7B.vocabulary).save_pretrained(directory)
        torch.cuda.empty_cache()
    return int(json.loads((directory / "config.json").read_text())["vocab_size"])


def free_port() -> int:
    """A port that nothing listens at."""
    with listen("127.0.0.1", 0) as found:
        return int(found.getsockname()[1])


@contextmanager
def started(server: Server, vllm: Sequence[str], directory: Path, log: Path) -> Iterator[tuple[int, float]]:
    """The port of a server that answers, and the seconds that it took. RuntimeError if it ends, or takes too long."""
    port, begin = free_port(), time.perf_counter()
    command = [*(vllm if server.peer else LOWBIT), "serve", str(directory), "--port", str(port), *server.arguments]
    # a process group of its own: vLLM's workers outlive their parent
    with log.open("wb") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(server.environment),
            cwd=directory if server.peer else None,
            start_new_session=True,
        )
    try:
        while not answers_health(port):
            if child.poll() is not None or time.perf_counter() - begin > LIMIT:
                raise RuntimeError(f"no server came up, its log ends: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield port, time.perf_counter() - begin
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(20)


def answers_health(port: int) -> bool:
    """True if a server says that it is healthy."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def lines_of(*command: str) -> Iterator[Row]:
    """The rows that a process prints. RuntimeError if it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {child.returncode}")


def bench_rows(directory: Path) -> Iterator[Row]:
    """Rows of the engine alone."""
    for row in lines_of(*LOWBIT, "bench", str(directory), *BENCH, "--dtype", "bfloat16", "--json"):
        kept = {"clients": row["batch"], "prompt": row["prompt"], "ms_between_median": row["ms_per_token"]}
        yield {"case": "bench"} | kept


def rows_of(port: int, vocabulary: int, cases: Sequence[str]) -> Iterator[Row]:
    """Rows of the clients, a process of their own; none without cases."""
    if cases:
        yield from lines_of(sys.executable, "-m", "benchmarks.serve_clients", str(port), str(vocabulary), *cases)


def server_rows(name: str, vocabulary: int, options: argparse.Namespace) -> Iterator[Row]:
    """Rows of one server, which ends after them. RuntimeError if it does not come up."""
    log = options.logs / f"{name.replace(' ', '-')}.log"
    with started(SERVERS[name], shlex.split(options.vllm), options.model, log) as (port, seconds):
        yield {"case": "start", "seconds": round(seconds, 2)}
        time.sleep(SETTLED if options.cases else 0)
        yield from rows_of(port, vocabulary, options.cases)


def main() -> None:
    """Measures the servers. One that does not come up is said, and the next one's turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="*", metavar="SERVER")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--model", type=Path, default=Path("/dev/shm/lowbit-peers/model"))
    parser.add_argument("--vllm", default="vllm", help="vLLM's command, with its environment: env NAME=VALUE vllm")
    parser.add_argument("--logs", type=Path, default=Path("/tmp"), help="the servers' output goes to this directory")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES)
    options = parser.parse_args()
    vocabulary, failed = written(options.model), False
    facts = {"shape": "llama2-7b", "method": METHOD, "dtype": "bfloat16"} | run_facts(options.commit)
    with options.output.open("a") as file:
        for name in [*(["bench"] if options.cases else []), *(options.servers or SERVERS)]:
            try:
                for row in bench_rows(options.model) if name == "bench" else server_rows(name, vocabulary, options):
                    row |= {"case": f"peer_{row['case']}", "server": name}
                    print(json.dumps(row), flush=True)
                    file.write(json.dumps(row | facts) + "\n")
                    file.flush()
            except RuntimeError as error:
                print(f"{name}: {error}", flush=True)
                failed = True
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
