"""Prompt to first token: `python -m benchmarks.bench_first_token --commit $(git rev-parse --short HEAD)`.

One row per case in benchmarks/results/first_token.jsonl: the first prompt of its length, the second (whose pass is
captured) and the median of later ones. Short prompts are padded and captured, then measured again without a graph.
Weights are random.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bench_decode import Case, engine_of
from benchmarks.measure import arguments, run_facts
from lowbit.engine.engine import Engine

RESULTS = Path(__file__).with_name("results") / "first_token.jsonl"
REPEATS = 7
PROMPTS = ((1, 1), (1, 16), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (8, 128))
CASES = (Case("llama2-7b", "w4", (1,), prompts=(8192,)), Case("llama2-7b", "w8a8", (1,), prompts=(8192,)))


def first_token_ms(engine: Engine, batch: int, prompt: int) -> float:
    """Wall time of one call that writes one token per prompt; the prompts differ."""
    prompts = torch.randint(0, engine.decoder.architecture.vocabulary, (batch, prompt)).tolist()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    engine.generate(prompts, max_new_tokens=1, ignore_eos=True)
    return (time.perf_counter() - begin) * 1e3


def times_of(engine: Engine, batch: int, prompt: int) -> dict[str, float]:
    """The first call's, the second's, and the median and range of REPEATS more."""
    first, second = (first_token_ms(engine, batch, prompt) for _ in range(2))
    later = [first_token_ms(engine, batch, prompt) for _ in range(REPEATS)]
    found = {"first_ms": first, "second_ms": second, "ms": statistics.median(later)}
    return {name: round(ms, 2) for name, ms in (found | {"least_ms": min(later), "most_ms": max(later)}).items()}


def rows_of(case: Case) -> Iterator[dict]:
    """Rows of all prompts, short ones padded and captured, then the short ones again without a graph."""
    engine = engine_of(case)
    first_token_ms(engine, max(batch for batch, _ in PROMPTS), 600)  # the cache, the libraries' handles
    reader = engine.spaces.idle[0].reader
    assert reader is not None
    captured = reader.lengths
    for lengths in (captured, ()):
        reader.lengths = lengths
        for batch, prompt in PROMPTS:
            if lengths or prompt <= captured[-1]:
                named = {"shape": case.shape, "method": case.method, "dtype": case.dtype, "padded": bool(lengths)}
                yield named | {"batch": batch, "prompt": prompt} | times_of(engine, batch, prompt)


def main() -> None:
    """Measures CASES."""
    options = arguments(__doc__, RESULTS)
    facts = run_facts(options.commit)
    with options.output.open("a") as file:
        for case in CASES:
            for row in rows_of(case):
                file.write(json.dumps(row | facts) + "\n")
                file.flush()
                print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
