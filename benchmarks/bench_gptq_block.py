"""GPTQ's inner loop: one launch a block of 128 columns against the loop of small launches it replaces.

    python -m benchmarks.bench_gptq_block --output benchmarks/results/gptq_block.jsonl

Prints and writes microseconds for one block of the rows of Llama-2-7B's linears, random data, medians over 20 runs.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.measure import run_facts, write_rows
from lowbit.quant.kernels import gptq_block
from lowbit.quant.kernels.gptq_block import BlockCall
from lowbit.quant.numbers import INT4

ROWS = (4096, 11008)
COLUMNS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    rows = []
    for n in ROWS:
        w, scales = torch.randn(1, n, COLUMNS, device="cuda"), torch.rand(1, n, COLUMNS, device="cuda") + 0.1
        x = torch.randn(512, COLUMNS, device="cuda", dtype=torch.float64)
        factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / len(x)), upper=True).float()[None]
        call = BlockCall(w, factor, scales, torch.zeros_like(w), *INT4.grid)
        for name, run in (("gptq_block", gptq_block.run), ("loop", gptq_block.reference)):
            times = sorted(microseconds(run, call) for _ in range(20))
            row = {"kernel": name, "ours": True, "n": n, "columns": COLUMNS, "us": statistics.median(times)}
            rows.append(row | {"us_p10": times[2], "us_p90": times[17], **run_facts(arguments.commit)})
            print(f"{name:12} {n:6} x {COLUMNS}  {row['us']:9.1f} us")
    if arguments.output:
        write_rows(arguments.output, rows)


def microseconds(run, call) -> float:
    """Time of one call, by events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run(call)
    start.record()
    run(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


if __name__ == "__main__":
    main()
