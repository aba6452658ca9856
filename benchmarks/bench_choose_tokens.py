"""The end of a step against torch's, greedy and sampled: `python -m benchmarks.bench_choose_tokens --commit HASH`.

Rows go to benchmarks/results/choose_tokens.jsonl: microseconds in a graph, without and with dependent launch.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.measure import arguments, run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.choose_tokens import ChoiceCall, Cursor, Noise, reference

RESULTS = Path(__file__).with_name("results") / "choose_tokens.jsonl"
ROWS = (1, 8, 64)
VOCABULARIES = (32000, 65024, 128256)


def row_of(m: int, n: int, noise: bool) -> dict:
    """One case's figures; torch's are those of the same step as plain operators."""
    tokens, written, positions, slots, seed = torch.zeros(5, m, dtype=torch.int64, device="cuda")
    call = ChoiceCall(torch.randn(m, n, device="cuda"), tokens, written, Cursor(positions, slots, 1 << 40))
    if noise:
        call = replace(call, noise=Noise(torch.ones(m, device="cuda"), seed))
    row = {"m": m, "n": n, "noise": noise, "us": time_calls([lambda: ops.choose(call)]).us}
    row["dependent_us"] = time_calls([lambda: ops.choose(replace(call, dependent=True))]).us
    row["torch_us"] = time_calls([lambda: reference(call)]).us
    return row


def main() -> None:
    """Measures every vocabulary and number of rows, without noise and with it."""
    args = arguments(__doc__, RESULTS)
    facts = run_facts(args.commit)
    rows = [row_of(*case) | facts for case in product(ROWS, VOCABULARIES, (False, True))]
    for row in rows:
        print(row)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
