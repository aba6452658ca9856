"""Row norms beside torch's: `python -m benchmarks.bench_row_norm --commit HASH`.

Rows go to benchmarks/results/row_norm.jsonl: microseconds in a graph, without and with dependent launch.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.measure import arguments, run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.row_norm import Rows

RESULTS = Path(__file__).with_name("results") / "row_norm.jsonl"
ROWS = (1, 8, 64, 1024)
WIDTHS = (4096, 5120, 8192)


def row_of(m: int, k: int, int8: str) -> dict:
    """One case's figures: an RMS norm, rounded to int8 by token or not."""
    x, weight = torch.randn(m, k, dtype=torch.float16, device="cuda"), torch.ones(k, dtype=torch.float16, device="cuda")
    call = Rows(x, "rms", weight, None, 1e-5, int8)
    row = {"m": m, "k": k, "int8": int8, "us": time_calls([lambda: ops.normalize(call)]).us}
    row["dependent_us"] = time_calls([lambda: ops.normalize(replace(call, dependent=True))]).us
    if int8 == "none":
        row["torch_us"] = time_calls([lambda: functional.rms_norm(x, (k,), weight, 1e-5)]).us
    return row


def main() -> None:
    """Measures every width and number of rows."""
    args = arguments(__doc__, RESULTS)
    facts = run_facts(args.commit)
    rows = [row_of(m, k, int8) | facts for m, k, int8 in product(ROWS, WIDTHS, ("none", "token"))]
    for row in rows:
        print(row)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
