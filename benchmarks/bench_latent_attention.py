"""Attention over compressed rows against its bytes: `python -m benchmarks.bench_latent_attention --commit HASH`.

Rows go to benchmarks/results/latent_attention.jsonl: microseconds in a graph with dependent launch for
DeepSeek-V2-Lite's 16 heads and DeepSeek-V3's 128, and those of a kernel that reads the positions' rows alone.
"""

from itertools import product
from pathlib import Path

import torch

from benchmarks.measure import CALLS, Floor, arguments, run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.kv_cache import KVCache
from lowbit.quant.kernels.latent_attention import RANK, TURNED, LatentCall

RESULTS = Path(__file__).with_name("results") / "latent_attention.jsonl"
HEADS, ROWS, LENGTHS = (16, 128), (1, 8), (128, 2048, 8192)
STILL = 128  # inputs of a head that are not rotated
DTYPE = torch.bfloat16


def call_of(heads: int, m: int, length: int) -> LatentCall:
    """Random rows, and a layer's cache."""
    rows = torch.randn(m, heads * (STILL + TURNED) + RANK + TURNED, dtype=DTYPE, device="cuda")
    q, compressed, turned = rows.split([heads * (STILL + TURNED), RANK, TURNED], -1)
    k, v = (torch.randn(m * length, 1, width, dtype=DTYPE, device="cuda") for width in (RANK, TURNED))
    table = torch.randn(length, TURNED // 2, device="cuda")
    last = torch.full((m,), length - 1, device="cuda")
    starts = torch.arange(m, device="cuda") * length
    absorbed = torch.randn(heads, m, RANK, dtype=DTYPE, device="cuda")
    q_turned, norm = q.unflatten(-1, (heads, -1))[..., STILL:], torch.ones(RANK, dtype=DTYPE, device="cuda")
    places = table, table, last, starts, last, KVCache(k, v)
    return LatentCall(absorbed, q_turned, compressed, turned, norm, *places, 0.1, 1e-6, length, dependent=True)


def row_of(heads: int, m: int, length: int, floor: Floor) -> dict:
    """One case's figures, over layers that L2 does not hold together."""
    nbytes = m * length * (RANK + TURNED) * DTYPE.itemsize
    layers = max(2, min(CALLS, (1 << 28) // nbytes))
    calls = [call_of(heads, m, length) for _ in range(layers)]
    timing = time_calls([lambda call=call: ops.attend_latent(call) for call in calls])
    return {"heads": heads, "m": m, "length": length, "us": timing.us, "floor_us": floor.time(nbytes).us}


def main() -> None:
    """Measures every number of heads, rows and positions."""
    args = arguments(__doc__, RESULTS)
    facts, floor = run_facts(args.commit), Floor()
    rows = [row_of(*case, floor) | facts for case in product(HEADS, ROWS, LENGTHS)]
    for row in rows:
        print(row)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
