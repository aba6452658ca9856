"""int4 weights in groups of 128 by rows in int8, against the same weights by rows in half precision, and vLLM's.

    python -m benchmarks.bench_w4a8_gemm --commit $(git rev-parse --short HEAD)

prints one table and writes benchmarks/results/w4a8_gemm.jsonl. `part` is "product", from codes of x on, "rounding +
product", from half precision on, as in w8a8.py, or "product of halves", of x in half precision that is not rounded. The
floor reads codes and scales. CUTLASS's rows of x are FP8, not int8, and so are its groups' scales.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from benchmarks.kernel_peers import GROUP, PEERS, REFUSALS, HummingLayer, cutlass_fp8, humming, marlin_int8, vllm_ops
from benchmarks.measure import Floor, run_facts, time_calls, write_rows
from benchmarks.w8a8 import PRODUCT, ROUNDED, Case
from benchmarks.wna16 import RESULTS, SHAPES, bytes_of, inputs_for, make_copies, row_of
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.row_norm import Rows

HALVES = "product of halves"
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SCHEME = (4, 128, True, torch.bfloat16)  # as the peers have it


def our_cases(copies: Sequence[PackedWeight], m: int) -> Iterator[Case]:
    """The product with and without the rounding of x, and the product of x in half precision."""
    x = torch.randn(m, copies[0].k, dtype=copies[0].dtype, device="cuda")
    rows = Rows(x, rounding="int8", shuffled=True, dependent=True)
    codes, scales = ops.quantize_rows(rows)
    calls = [PackedCall(codes, w, x_scales=scales, dependent=True) for w in copies]

    def rounded(weight: PackedWeight) -> torch.Tensor:
        found = ops.quantize_rows(rows)
        return ops.linear(PackedCall(found[0], weight, x_scales=found[1], dependent=True))

    name, halves = choose_kernel(calls[0].problem()).name, inputs_for(copies[0], m)
    yield Case(name, True, PRODUCT, [lambda call=call: ops.linear(call) for call in calls], True)
    yield Case(name, True, ROUNDED, [lambda w=w: rounded(w) for w in copies], True)
    plain = [PackedCall(halves, w, dependent=True) for w in copies]
    name = choose_kernel(plain[0].problem()).name
    yield Case(name, True, HALVES, [lambda call=call: ops.linear(call) for call in plain], True)


def peer_cases(m: int, n: int, k: int) -> Iterator[Case]:
    """Kernels of others that take these weights: by x in half precision, in bfloat16, and by x in 8 bits."""
    makers = [(each.name, HALVES, each.calls) for each in PEERS if each.dtype == SCHEME[-1] and each.bits == SCHEME[0]]
    if vllm_ops is not None:
        makers += [("vllm marlin int8", PRODUCT, marlin_int8), ("vllm cutlass fp8", PRODUCT, cutlass_fp8)]
    if HummingLayer is not None:
        makers += [("humming int8", ROUNDED, humming("int8", dtype="int4", group_size=GROUP))]
        makers += [("humming", HALVES, humming(dtype="int4", group_size=GROUP))]
    for name, part, calls in makers:
        try:
            yield Case(name, False, part, calls(m, n, k))
        except REFUSALS as error:
            print(f"{name} with {m} rows: {type(error).__name__}: {str(error)[:300]}", flush=True)


def rows_of(floor: Floor, n: int, k: int, rows: Sequence[int]) -> Iterator[dict]:
    bits, group_size, symmetric, dtype = SCHEME
    copies, read = make_copies(n, k, *SCHEME), floor.time(bytes_of(n, k, bits, group_size, symmetric))
    for m in rows:
        for case in chain(our_cases(copies, m), peer_cases(m, n, k)):
            more = {"part": case.part, "dependent": case.dependent}
            try:
                timing = time_calls(case.calls)
            except REFUSALS as error:
                print(f"{case.name} with {m} rows: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            yield row_of(case.name, case.ours, m, n, k, bits, group_size, dtype, timing, read, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--output", type=Path, default=RESULTS / "w4a8_gemm.jsonl")
    parser.add_argument("--shapes", nargs="+", type=int, default=range(8), help="places in wna16.SHAPES")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="of x")
    options = parser.parse_args()
    floor = Floor()
    shared, rows = {"read_ceiling_gbs": floor.read_ceiling_gbs(), **run_facts(options.commit)}, list[dict]()
    for n, k in (SHAPES[i] for i in options.shapes):
        for row in rows_of(floor, n, k, options.rows):
            rows.append({**row, **shared})
            print(f"{n:>6} x {k:<6} m {row['m']:<5} {row['kernel']:<18} {row['part']:<20} {row['us']:8.2f}", flush=True)
            write_rows(options.output, rows)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
