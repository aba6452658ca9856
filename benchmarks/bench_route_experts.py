"""The choice of experts against torch's: `python -m benchmarks.bench_route_experts --commit HASH`.

Rows go to benchmarks/results/route_experts.jsonl: microseconds in a graph, without and with dependent launch.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.measure import arguments, run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.route_experts import RouteCall, Rule, reference

RESULTS = Path(__file__).with_name("results") / "route_experts.jsonl"
ROWS = (1, 8, 16)
# Experts, inputs and rule of Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-20b and DeepSeek-V3.
ROUTERS = (
    (128, 2048, Rule(8)),
    (8, 4096, Rule(2)),
    (32, 2880, Rule(4, "chosen")),
    (256, 7168, Rule(8, "sigmoid", scale=2.5, groups=8, used_groups=4, group_best=2)),
)


def row_of(m: int, router: tuple[int, int, Rule]) -> dict:
    """One case's figures; torch's are those of the same choice as plain operators."""
    experts, k, rule = router
    x, weight = (torch.randn(rows, k, dtype=torch.bfloat16, device="cuda") for rows in (m, experts))
    call = RouteCall(x, weight, rule)
    row = {"m": m, "experts": experts, "k": k, "top": rule.top, "us": time_calls([lambda: ops.route_experts(call)]).us}
    row["dependent_us"] = time_calls([lambda: ops.route_experts(replace(call, dependent=True))]).us
    row["torch_us"] = time_calls([lambda: reference(call)]).us
    return row


def main() -> None:
    """Measures every router and number of rows."""
    args = arguments(__doc__, RESULTS)
    facts = run_facts(args.commit)
    rows = [row_of(*case) | facts for case in product(ROWS, ROUTERS)]
    for row in rows:
        print(row)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
