"""Decode attention against the floor and torch's: `python -m benchmarks.bench_decode_attention --commit HASH`.

Rows go to benchmarks/results/decode_attention.jsonl: microseconds of one layer's attention in graphs over rotating
caches of each number type, without and with dependent launch. torch's attention sees the exact length; ours a graph for
every length.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.measure import Floor, arguments, copies_for, run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import AttentionCall
from lowbit.quant.kernels.kv_cache import CACHE_NUMBERS, CacheNumber, KVCache, empty_cache, reason_against_width

RESULTS = Path(__file__).with_name("results") / "decode_attention.jsonl"
# heads, kv_heads, head_dim of Llama-2-7B, Llama-3-8B, ChatGLM2-6B, and of the two kinds of layers of Gemma-4-26B-A4B
SHAPES = ((32, 32, 128), (32, 8, 128), (32, 2, 128), (16, 8, 256), (16, 2, 512))
SIZES = ((8, 2048), (1, 32768), (1, 2048), (8, 128), (1, 128))  # batch, positions
TARGET_MS = 5.0  # of a case's replays


def random_cache(number: CacheNumber, sides: tuple[int, int, int]) -> KVCache:
    """A cache of random codes, on the GPU, for activations in float16."""
    like = torch.empty(0, dtype=torch.float16, device="cuda")
    scales = (torch.full((sides[1],), 0.03, device="cuda"),) * 2
    cache = empty_cache(number, sides, like, scales)
    for codes, sides_of in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        if number.storage in (torch.int8, torch.int32):
            limits = torch.iinfo(codes.dtype)
            codes.random_(limits.min, limits.max)
        else:
            codes.copy_(torch.randn(codes.shape, dtype=torch.float16, device="cuda"))
        if number.scales == "token" and sides_of is not None:
            sides_of.fill_(0.03)
    return cache


def make_attention(shape: tuple[int, int, int], batch: int, length: int, number: CacheNumber) -> AttentionCall:
    """A token of each of `batch` sequences at the last of `length` positions."""
    heads, kv_heads, head_dim = shape
    cache = random_cache(number, (batch * length, kv_heads, head_dim))
    q = torch.randn(batch, heads * head_dim, dtype=torch.float16, device="cuda")
    starts = torch.arange(batch, device="cuda") * length
    return AttentionCall(q, cache, starts, torch.full_like(starts, length - 1), head_dim**-0.5, longest=length)


def torchs(call: AttentionCall, batch: int) -> Callable[[], object]:
    """torch's attention on the same tensors."""
    cache = call.cache
    q = call.q.view(batch, 1, call.heads, cache.head_dim).transpose(1, 2)
    k, v = (part.view(batch, -1, cache.kv_heads, cache.head_dim).transpose(1, 2) for part in (cache.k, cache.v))
    return lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def row_of(shape: tuple[int, int, int], batch: int, length: int, number: CacheNumber, floor: Floor) -> dict:
    """One case's figures."""
    nbytes = 2 * batch * length * shape[1] * number.head_nbytes(shape[2], torch.float16)
    calls = [make_attention(shape, batch, length, number) for _ in range(copies_for(nbytes))]
    row = {"heads": shape[0], "kv_heads": shape[1], "head_dim": shape[2], "batch": batch, "length": length}
    row |= {"cache": number.name, "nbytes": nbytes, "floor_us": floor.time(nbytes).us}
    row |= asdict(time_calls([lambda call=call: ops.attend(call) for call in calls], TARGET_MS))
    dependent = [replace(call, dependent=True) for call in calls]
    row["dependent_us"] = time_calls([lambda call=call: ops.attend(call) for call in dependent], TARGET_MS).us
    if number.storage is None:
        row["torch_us"] = time_calls([torchs(call, batch) for call in calls], TARGET_MS).us
    return row


def main() -> None:
    """Measures every shape, size and number type."""
    args = arguments(__doc__, RESULTS)
    floor, facts = Floor(), run_facts(args.commit)
    rows = []
    for shape, (batch, length), number in product(SHAPES, SIZES, CACHE_NUMBERS.values()):
        if reason_against_width(number, shape[2]):
            continue
        rows.append(row_of(shape, batch, length, number, floor) | facts)
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
        write_rows(args.output, rows)


if __name__ == "__main__":
    main()
