"""Decode attention against the floor and torch's: `python -m benchmarks.bench_decode_attention --commit HASH`.

Rows go to benchmarks/results/decode_attention.jsonl: microseconds of one layer's attention in graphs over rotating
caches, without and with dependent launch. torch's attention sees the exact length; ours a graph for every length.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.measure import Floor, arguments, copies_for, run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import AttentionCall, KVCache

RESULTS = Path(__file__).with_name("results") / "decode_attention.jsonl"
# heads, kv_heads, head_dim of Llama-2-7B, Llama-3-8B, ChatGLM2-6B
SHAPES = ((32, 32, 128), (32, 8, 128), (32, 2, 128))
BATCHES = (1, 8)
LENGTHS = (128, 2048)


def make_attention(shape: tuple[int, int, int], batch: int, length: int, int8: bool) -> AttentionCall:
    """A token of each of `batch` sequences at the last of `length` positions."""
    heads, kv_heads, head_dim = shape
    sides = (batch * length, kv_heads)
    k, v = (torch.randn(*sides, head_dim, dtype=torch.float16, device="cuda") for _ in range(2))
    cache = KVCache(k, v)
    if int8:
        scales = torch.full(sides, 0.03, dtype=torch.float16, device="cuda")
        cache = KVCache((k * 40).to(torch.int8), (v * 40).to(torch.int8), scales, scales.clone())
    q = torch.randn(batch, heads * head_dim, dtype=torch.float16, device="cuda")
    starts = torch.arange(batch, device="cuda") * length
    return AttentionCall(q, cache, starts, torch.full_like(starts, length - 1), head_dim**-0.5, longest=length)


def torchs(call: AttentionCall, batch: int) -> Callable[[], object]:
    """torch's attention on the same tensors."""
    cache = call.cache
    q = call.q.view(batch, 1, call.heads, cache.head_dim).transpose(1, 2)
    k, v = (part.view(batch, -1, cache.kv_heads, cache.head_dim).transpose(1, 2) for part in (cache.k, cache.v))
    return lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def row_of(shape: tuple[int, int, int], batch: int, length: int, int8: bool, floor: Floor) -> dict:
    """One case's figures."""
    nbytes = 2 * batch * length * shape[1] * (shape[2] + 2 if int8 else 2 * shape[2])
    calls = [make_attention(shape, batch, length, int8) for _ in range(copies_for(nbytes))]
    row = {"heads": shape[0], "kv_heads": shape[1], "head_dim": shape[2], "batch": batch, "length": length}
    row |= {"cache": "int8" if int8 else "float16", "nbytes": nbytes, "floor_us": floor.time(nbytes).us}
    row["us"] = time_calls([lambda call=call: ops.attend(call) for call in calls]).us
    dependent = [replace(call, dependent=True) for call in calls]
    row["dependent_us"] = time_calls([lambda call=call: ops.attend(call) for call in dependent]).us
    if not int8:
        row["torch_us"] = time_calls([torchs(call, batch) for call in calls]).us
    return row


def main() -> None:
    """Measures every shape, batch and length."""
    args = arguments(__doc__, RESULTS)
    floor, facts = Floor(), run_facts(args.commit)
    rows = []
    for shape, batch, length, int8 in product(SHAPES, BATCHES, LENGTHS, (False, True)):
        rows.append(row_of(shape, batch, length, int8, floor) | facts)
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
