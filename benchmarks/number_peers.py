"""Products of few rows with weights of every number type, ours and other libraries', on random weights of their own.

    python -m benchmarks.number_peers --commit $(git rev-parse --short HEAD) [--shapes 0 1] [--peers vllm]

needs vLLM, Humming or gemlite beside lowbit; what is missing is left out. Rows go to
benchmarks/results/number_peers.jsonl. Ours are in bfloat16 like vLLM's and Humming's, launched plainly and dependent;
gemlite's are in float16. The floor is a kernel that only reads as many bytes as our packed weight has. A peer whose
codes or scales have another form than ours (Marlin's FP8 in blocks has a scale for each output and 128 inputs) reads
its own bytes.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import kernel_peers
from benchmarks.bench_numbers import make_copies
from benchmarks.kernel_peers import E8M0, GROUP, REFUSALS, Calls, gemlite_channel, gemlite_hqq, humming, machete, marlin
from benchmarks.measure import Floor, run_facts, time_calls, write_rows
from benchmarks.wna16 import RESULTS, SHAPES, inputs_for
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall
from lowbit.quant.kernels.registry import choose_kernel

FP8 = torch.float8_e4m3fn
ROWS = (1, 2, 4, 8, 16)
TARGET_MS = 3.0  # of a case's replays
GEMLITE_ROWS = (1, 8)
GEMLITE_SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))  # of its table: it tunes itself to others

Maker = Callable[[int, int, int], Calls]
# For each scheme of ours, kernels' names and their calls for (m, n, k).
VLLM: dict[str, dict[str, Maker]] = {
    "int4-g128": {"marlin": marlin("uint4b8", GROUP), "machete": machete("uint4b8", GROUP)},
    "int8": {"marlin": marlin("uint8b128", None), "machete": machete("uint8b128", None)},
    "fp8-a16": {"marlin": marlin("float8_e4m3fn", None)},
    "fp8-block-a16": {"marlin": marlin("float8_e4m3fn", GROUP)},
    "nvfp4-a16": {"marlin": marlin("float4_e2m1f", 16, FP8)},
    "mxfp4-a16": {"marlin": marlin("float4_e2m1f", 32, E8M0)},
}
HUMMING = {
    **{f"int{bits}-g128": humming(dtype=f"int{bits}", group_size=GROUP) for bits in (2, 3, 4, 6)},
    "int8": humming(dtype="int8"),
    "fp8-a16": humming(dtype="float8e4m3"),
    "fp8-block-a16": humming(dtype="float8e4m3", group_size=GROUP, group_size_n=GROUP),
    "nvfp4-a16": humming(dtype="float4e2m1", group_size=16, scale_dtype="float8e4m3", scale_2_type="tensor"),
    "mxfp4-a16": humming(dtype="float4e2m1", group_size=32, scale_dtype="float8e8m0"),
}
GEMLITE = {
    "int2-g128": gemlite_hqq("A16W2_HQQ_INT", 2),
    "int4-g128": gemlite_hqq("A16W4_HQQ_INT", 4),
    "int8": gemlite_channel("A16W8_INT8", torch.int8),
    "fp8-a16": gemlite_channel("A16W8_FP8", FP8),
}
LIBRARIES = {
    "vllm": (kernel_peers.vllm_ops, VLLM),
    "humming": (kernel_peers.HummingLayer, {name: {"humming": calls} for name, calls in HUMMING.items()}),
    "gemlite": (kernel_peers.gemlite, {name: {"gemlite": calls} for name, calls in GEMLITE.items()}),
}
Row = dict[str, object]


def timed(calls: Calls) -> Row:
    return asdict(time_calls(calls, TARGET_MS))


def our_rows(copies: Sequence[PackedWeight]) -> Iterator[Row]:
    for m in ROWS:
        x = inputs_for(copies[0], m)
        name = choose_kernel(PackedCall(x, copies[0]).problem()).name
        for dependent in (False, True):
            calls = [lambda w=w, x=x, d=dependent: ops.linear(PackedCall(x, w, dependent=d)) for w in copies]
            yield {"kernel": name, "ours": True, "m": m, "dependent": dependent, **timed(calls)}


def peer_rows(name: str, calls: Maker, index: int) -> Iterator[Row]:
    if name == "gemlite" and SHAPES[index] not in GEMLITE_SHAPES:
        return
    for m in GEMLITE_ROWS if name == "gemlite" else ROWS:
        try:
            yield {"kernel": name, "ours": False, "m": m, "dependent": False, **timed(calls(m, *SHAPES[index]))}
        except REFUSALS as error:
            print(f"{name} with {m} rows: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.cuda.empty_cache()


def rows_of(floor: Floor, scheme: str, index: int, libraries: Sequence[str]) -> Iterator[Row]:
    """The rows of one weight."""
    n, k = SHAPES[index]
    copies = make_copies(scheme, n, k, torch.bfloat16)
    nbytes, facts = copies[0].nbytes, {"scheme": scheme, "n": n, "k": k}
    facts |= {"nbytes": nbytes, "floor_us": floor.time(nbytes).us}
    yield from (row | facts for row in our_rows(copies))
    del copies
    for library in libraries:
        here, peers = LIBRARIES[library]
        for name, calls in peers.get(scheme, {}).items() if here is not None else ():
            yield from (row | facts for row in peer_rows(name, calls, index))


def main() -> None:
    """Measures some named shapes with some schemes; all, if not told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, default=RESULTS / "number_peers.jsonl")
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="places in wna16.SHAPES")
    parser.add_argument("--schemes", nargs="+", choices=HUMMING, default=list(HUMMING))
    parser.add_argument("--peers", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    args = parser.parse_args()
    floor, rows = Floor(), []
    shared = {"read_ceiling_gbs": floor.read_ceiling_gbs(), **run_facts(args.commit)}
    for index in args.shapes:
        for scheme in args.schemes:
            for row in rows_of(floor, scheme, index, args.peers):
                rows.append(row | shared)
                launch = "dependent" if row["dependent"] else "plain"
                told = f"{row['n']:>6} x {row['k']:<6} m {row['m']:<3} {scheme:<14} {row['kernel']:<12} {launch:<10}"
                print(f"{told} {row['us']:8.2f} us  floor {row['floor_us']:7.2f}", flush=True)
            write_rows(args.output, rows)


if __name__ == "__main__":
    main()
