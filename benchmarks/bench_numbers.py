"""The fused product of few rows with weights of every number type, against the floor of the same bytes.

    python -m benchmarks.bench_numbers --commit $(git rev-parse --short HEAD)

prints one line per case and writes benchmarks/results/numbers.jsonl. Kernel and launch are those of the rule, with
dependent launch, rows in panels where a step has them so. The floor is a kernel that only reads as many bytes as
the packed weight has.
"""

from dataclasses import asdict, replace

import torch

from benchmarks.measure import Floor, arguments, copies_for, run_facts, time_calls, write_rows
from benchmarks.wna16 import RESULTS, inputs_for
from lowbit.engine.shapes import random_weight
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import PackedWeight, prepack
from lowbit.quant.kernels.problem import PackedCall
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import parse_scheme

SCHEMES = (
    "int4-g128",
    "nvfp4-a16",
    "mxfp4-a16",
    "int3-g128",
    "int2-g128",
    "int6-g128",
    "int8",
    "fp8-a16",
    "fp8-block-a16",
)
SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (28672, 8192))
ROWS = (1, 2, 4, 8)
TARGET_MS = 4.0  # of a case's replays


def make_copies(scheme: str, n: int, k: int, dtype: torch.dtype) -> list[PackedWeight]:
    """Copies of a random weight on the GPU, for inputs in `dtype`, enough to evict each from L2 before its next use."""
    weight = random_weight(n, k, parse_scheme(scheme), torch.empty(0, dtype=dtype, device="cuda"))
    assert isinstance(weight, QTensor)
    packed = prepack(weight, dtype)
    return [replace(packed, words=packed.words.clone()) for _ in range(copies_for(packed.nbytes))]


def rows_of(floor: Floor, scheme: str, n: int, k: int) -> list[dict]:
    """The rows of one weight."""
    copies, found = make_copies(scheme, n, k, torch.float16), []
    weight = copies[0]
    read = floor.time(weight.nbytes)
    for m in ROWS:
        x = inputs_for(weight, m)
        calls = [lambda w=w, x=x: ops.linear(PackedCall(x, w, dependent=True)) for w in copies]
        kernel, timing = choose_kernel(PackedCall(x, weight).problem()).name, time_calls(calls, TARGET_MS)
        named = {"kernel": kernel, "scheme": scheme, "m": m, "n": n, "k": k, "nbytes": weight.nbytes}
        named["panels"] = x.ndim == 3
        found.append({**named, **asdict(timing), "floor_us": read.us})
    return found


def main() -> None:
    """Measures every scheme on every shape."""
    options = arguments(__doc__, RESULTS / "numbers.jsonl")
    floor, rows = Floor(), []
    facts = {"read_ceiling_gbs": floor.read_ceiling_gbs(), **run_facts(options.commit)}
    for n, k in SHAPES:
        for scheme in SCHEMES:
            for row in rows_of(floor, scheme, n, k):
                rows.append({**row, **facts})
                share = f"floor {row['floor_us']:7.2f}  share {row['floor_us'] / row['us']:.3f}"
                print(f"{n:>6} x {k:<6} m {row['m']} {scheme:<14} {row['us']:8.2f} us  {share}", flush=True)
            torch.cuda.empty_cache()
        write_rows(options.output, rows)


if __name__ == "__main__":
    main()
