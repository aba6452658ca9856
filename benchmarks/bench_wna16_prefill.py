"""Products of many rows of x (a prompt's) with a packed weight: each of our methods by name, cuBLAS, Marlin, Machete.

    python -m benchmarks.bench_wna16_prefill --commit $(git rev-parse --short HEAD)

writes benchmarks/results/wna16_prefill.jsonl. `chosen` marks the method that the rule takes. "chunks" is a method that
the rule does not have: the weight is dequantized in parts, so that cuBLAS finds each part in L2. `--cuts` instead times
wna16_prefill with every cut, to fit the rule. The last column is the best peer's time over ours: Marlin, Machete and
Humming with as many bits, and cuBLAS on a dense weight. All in bfloat16, the dtype of the peers' rows, in which cuBLAS
is faster.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernel_peers import GROUP, PEERS, HummingLayer, Peer, cublas, humming
from benchmarks.measure import Floor, run_facts, time_calls, write_rows
from benchmarks.wna16 import bytes_of, describe, make_copies, measure_peer, row_of
from lowbit.quant.kernels import wna16_dequantize, wna16_prefill
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall, Problem
from lowbit.quant.kernels.registry import choose_kernel

SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (28672, 4096), (8192, 28672))
ROWS = (96, 128, 192, 256, 512, 1024, 2048, 4096)
CUT_ROWS = (96, 256, 1024)
SCHEMES = ((4, 128, True, torch.bfloat16), (8, -1, True, torch.bfloat16))
CALLS = 5  # at least, in a graph: of up to 5 milliseconds each
CHUNK_BYTES = 16 << 20  # dense, of the 50 MB of an H100's L2
RESULTS = Path(__file__).with_name("results")

Way = Callable[[PackedCall, Problem], Tensor]


def in_chunks(call: PackedCall, problem: Problem) -> Tensor:
    """x W^T, CHUNK_BYTES of the dense W at a time, in rows of W's own order."""
    w, y = call.weight, torch.empty(call.y_shape, dtype=call.y_dtype, device=call.x.device)
    rows = max(128, CHUNK_BYTES // (2 * w.k) // 128 * 128)
    for first in range(0, w.n, rows):
        dense = wna16_dequantize.dequantize(rows_of_weight(w, first, min(w.n, first + rows)))
        torch.mm(call.x, dense.T, out=y[:, first : first + rows])
    return y


def rows_of_weight(w: PackedWeight, first: int, end: int) -> PackedWeight:
    """Rows [first, end) of a weight packed in its own order; `first` is a multiple of 16."""
    tiles = slice(first // 16, -(-end // 16))
    zeros = None if w.zeros is None else w.zeros[tiles]
    return replace(w, words=w.words[tiles], scales=w.scales[tiles], zeros=zeros, n=end - first)


WAYS: dict[str, Way] = {
    "wna16_prefill": wna16_prefill.run,
    "wna16_dequantize": lambda call, problem: wna16_dequantize.run(call),
    "chunks": in_chunks,
}


def cuts_of(problem: Problem) -> list[tuple[str, Way, dict]]:
    """Every cut of wna16_prefill, with its fields for a row."""
    return [
        ("wna16_prefill", partial(wna16_prefill.run, cut=cut), asdict(cut)) for cut in wna16_prefill.cuts_of(problem)
    ]


def ways_of(problem: Problem) -> list[tuple[str, Way, dict]]:
    """The three methods, with their fields for a row."""
    cut, chosen = asdict(wna16_prefill.choose_cut(problem)), choose_kernel(problem).name
    return [
        (name, way, {"chosen": name == chosen, **(cut if name == "wna16_prefill" else {})})
        for name, way in WAYS.items()
    ]


def measure_ours(floor: Floor, n: int, k: int, scheme: tuple, rows: Sequence[int], cuts: bool) -> list[dict]:
    bits, group_size, symmetric, dtype = scheme
    copies = make_copies(n, k, *scheme)
    read = floor.time(bytes_of(n, k, bits, group_size, symmetric))
    measured = []
    for m in rows:
        calls = [PackedCall(torch.randn(m, k, dtype=dtype, device="cuda"), w) for w in copies]
        problem = calls[0].problem()
        for name, way, more in cuts_of(problem) if cuts else ways_of(problem):
            timing = time_calls([partial(way, call, problem) for call in calls], calls_in_graph=CALLS)
            measured.append(row_of(name, True, m, n, k, bits, group_size, dtype, timing, read, **more))
    return measured


def peers(widths: Sequence[int]) -> list[Peer]:
    """cuBLAS on a dense weight, and of vLLM's kernels and Humming's what is installed and takes one of the widths."""
    found = [Peer("cublas", 16, torch.bfloat16, partial(cublas, dtype=torch.bfloat16))]
    found += [each for each in PEERS if each.name.startswith("vllm ") and each.bits in widths]
    if HummingLayer is not None and 4 in widths:
        found.append(Peer("humming", 4, torch.bfloat16, humming(dtype="int4", group_size=GROUP)))
    return [replace(peer, most_rows=max(ROWS)) for peer in found]


def gains(rows: Sequence[dict]) -> dict[tuple[int, int, int, int], float]:
    """By m, n, k and bits, the best peer's time over that of the chosen method."""
    found = {}
    for row in rows:
        if not row.get("chosen"):
            continue
        same = [r for r in rows if not r["ours"] and all(r[key] == row[key] for key in ("m", "n", "k"))]
        best = min(r["us"] for r in same if r["bits"] in (row["bits"], 16))
        found[row["m"], row["n"], row["k"], row["bits"]] = best / row["us"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--output", type=Path, default=RESULTS / "wna16_prefill.jsonl")
    parser.add_argument("--cuts", action="store_true", help="time every cut of wna16_prefill's work instead")
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="places in SHAPES")
    parser.add_argument("--rows", nargs="+", type=int, help="of x")
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=(4, 8))
    options = parser.parse_args()
    counts = options.rows or (CUT_ROWS if options.cuts else ROWS)
    schemes = [scheme for scheme in SCHEMES if scheme[0] in options.bits]
    floor = Floor()
    shared = {"read_ceiling_gbs": floor.read_ceiling_gbs(), **run_facts(options.commit)}
    rows: list[dict] = []
    for n, k in (SHAPES[i] for i in options.shapes):
        measured = [row for each in schemes for row in measure_ours(floor, n, k, each, counts, options.cuts)]
        torch.cuda.empty_cache()
        for peer in () if options.cuts else peers(options.bits):
            measured += measure_peer(peer, floor, n, k, counts, CALLS)
        found = gains(measured)
        for row in measured:
            gain = found.get((row["m"], n, k, row["bits"]), 0) if row.get("chosen") else 0
            print(describe(row) + (f"  best peer x {gain:.3f}" if gain else ""), flush=True)
        rows += [{**row, **shared} for row in measured]
        write_rows(options.output, rows)


if __name__ == "__main__":
    main()
