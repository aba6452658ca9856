"""The table STEPS of `export/engines/steps.py`, fitted to the rows of `decode.jsonl`: `python -m benchmarks.fit_steps`.

A step of one sequence is a time for each block, and the bytes of each kernel's weights over that kernel's rate. The
fit minimizes the squared relative error over rows of batch 1 after a prompt of 128 tokens, at the commits named.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.engine.shapes import SHAPES

RESULTS = Path(__file__).with_name("results") / "decode.jsonl"
GPUS = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
COMMITS = ("0ceb7e1", "9b88251", "14bfcca", "94ceede")
KINDS = ("w4", "int8", "dense", "w8a8")  # methods of the rows, each with a kernel of its own


def rows_of(gpu: str) -> list[dict[str, Any]]:
    """The rows that are fitted: the latest of each shape, method and dtype."""
    rows = (json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines())
    alike = {"gpu": GPUS[gpu], "batch": 1, "prompt": 128, "cache": "same"}
    kept = {
        (row["shape"], row["method"], row["dtype"]): row
        for row in rows
        if row["commit"] in COMMITS and alike.items() <= row.items()
    }
    return list(kept.values())


def fitted(gpu: str) -> tuple[list[float], list[float]]:
    """Microseconds a block and GB/s of each of KINDS; and the relative error of each row."""
    rows = rows_of(gpu)
    columns = np.array([list(_columns(row)) for row in rows])
    times = np.array([row["ms_per_token"] for row in rows])
    found = np.linalg.lstsq(columns / times[:, None], np.ones(len(rows)), rcond=None)[0]
    return [1e3 * float(found[0]), *(1e3 / found[1:]).tolist()], (columns @ found / times - 1).tolist()


def _columns(row: dict[str, Any]) -> Iterator[float]:
    """Blocks, and GB read by each kernel."""
    yield float(len(SHAPES[row["shape"]].layers))
    for kind in KINDS:
        yield row["floor_ms"] * row["read_gbs"] / 1e3 if row["method"] == kind else 0.0


if __name__ == "__main__":
    for name in GPUS:
        values, errors = fitted(name)
        print(name, [round(value, 1) for value in values], f"errors {min(errors):+.1%} to {max(errors):+.1%}")
