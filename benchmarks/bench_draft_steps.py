"""A step that checks drafts, beside a plain one: `python -m benchmarks.bench_draft_steps --commit HASH`.

Milliseconds of a step that checks so many rows of one sequence, with the copy of its tokens to the host, by the text's
length: the least of several runs. Weights are random. Rows go to benchmarks/results/draft_steps.jsonl.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_decode import CASES, Case, engine_of
from benchmarks.measure import run_facts
from lowbit.engine.speed import check_seconds

RESULTS = Path(__file__).with_name("results") / "draft_steps.jsonl"
SHAPES = ("llama2-7b", "llama3-8b", "llama2-13b")
WIDTHS = (1, 2, 4, 8)
POSITIONS = (128, 1900)


def cases() -> Iterator[Case]:
    """The first case in 4 bits of each shape."""
    for shape in SHAPES:
        head = next(case.head for case in CASES if (case.shape, case.method) == (shape, "w4"))
        yield Case(shape, "w4", (1,), head=head, prompts=(2 * POSITIONS[-1],))


def rows_of(case: Case) -> Iterator[dict[str, Any]]:
    """The case's rows: each width at each length."""
    engine = engine_of(case)
    engine.generate([[1, 2, 3]], max_new_tokens=2, ignore_eos=True)  # takes the cache
    for positions in POSITIONS:
        for width in WIDTHS:
            ms = 1e3 * check_seconds(engine, 1, width, 2 * positions)
            row = {"shape": case.shape, "method": case.method, "dtype": case.dtype, "cache": case.cache}
            yield row | {"head": case.head, "positions": positions, "rows": width, "ms": round(ms, 4)}


def main() -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    facts = run_facts(arguments.commit)
    with arguments.output.open("a") as file:
        for case in cases():
            for row in rows_of(case):
                file.write(json.dumps(row | facts) + "\n")
                file.flush()
                print(json.dumps(row | facts), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
