"""The dense product for few rows against the floor and torch's linear (cuBLAS), in bfloat16.

    python -m benchmarks.bench_dense_gemv --commit $(git rev-parse --short HEAD)
    python -m benchmarks.bench_dense_gemv --commit $(git rev-parse --short HEAD) --sweep

prints one table and writes benchmarks/results/dense_gemv.jsonl; with --sweep it times every reasonable split, with
dependent launch, next to the one that the rule chooses, and writes dense_gemv_sweep.jsonl. "block" is the four products
of a block of Llama-2-7B, each fed by the previous one: swept over the most stages of a ring, and the fewest blocks that
share k if multiprocessors would be idle.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import Floor, copies_for, run_facts, time_calls, write_rows
from benchmarks.wna16 import RESULTS, random_shapes, row_of
from lowbit.quant.kernels import dense, dense_gemv, ops, ring
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.registry import choose_kernel

# Llama-2 7B with its head, 13B, ChatGLM2's head: outputs x inputs.
SHAPES = (
    (4096, 4096),
    (12288, 4096),
    (22016, 4096),
    (4096, 11008),
    (15360, 5120),
    (5120, 13824),
    (32000, 4096),
    (65024, 4096),
)
DTYPE = torch.bfloat16
ROWS, SWEPT_ROWS = (1, 8, 16, 32, 64), (1, 16, 64)
HIDDEN, QKV, INNER = 4096, 12288, 11008
BLOCK = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))
BLOCK_CUTS = [(stages, cluster) for stages in (24, 11, 8, 5) for cluster in (1, 2, 4)]  # the first: the rule's


def make_weights(n: int, k: int) -> list[Tensor]:
    """Copies of one weight, enough to evict each from L2 before its next use."""
    weight = torch.randn(n, k, dtype=DTYPE, device="cuda") * 0.02
    return [weight.clone() for _ in range(copies_for(2 * n * k))]


def measure(m: int, weights: list[Tensor], floor: Floor) -> Iterator[dict]:
    """Our product, without and with dependent launch, and torch's."""
    n, k = weights[0].shape
    x, read = torch.randn(m, k, dtype=DTYPE, device="cuda"), floor.time(2 * n * k)
    name = choose_kernel(DenseCall(x, weights[0]).problem()).name
    for dependent in (False, True):
        timing = time_calls([lambda w=w, d=dependent: ops.linear(DenseCall(x, w, dependent=d)) for w in weights])
        yield row_of(name, True, m, n, k, 16, -1, DTYPE, timing, read, dependent=dependent)
    timing = time_calls([lambda w=w: functional.linear(x, w) for w in weights])
    yield row_of("cublas", False, m, n, k, 16, -1, DTYPE, timing, read, dependent=False)


def sweep(m: int, weights: list[Tensor], floor: Floor) -> Iterator[dict]:
    """Every cut, the rule's first."""
    n, k = weights[0].shape
    x, read = torch.randn(m, k, dtype=DTYPE, device="cuda"), floor.time(2 * n * k)
    calls = [DenseCall(x, w, dependent=True) for w in weights]
    problem = calls[0].problem()
    chosen = dense_gemv.choose_cut(problem)
    others = [cut for cut in ring.cuts_of(m, n, 2 * k, problem.processors) if cut != chosen]
    for cut in (chosen, *others):
        timing = time_calls([lambda c=c, cut=cut: dense_gemv.run(c, problem, cut) for c in calls], target_ms=5.0)
        more = {"dependent": True, **asdict(cut), "chosen": cut == chosen}
        yield row_of("dense_gemv", True, m, n, k, 16, -1, DTYPE, timing, read, **more)


def block(x: Tensor, weights: list[Tensor], compute: Callable[[DenseCall], Tensor]) -> Tensor:
    """A block's products, with dependent launch if possible."""
    qkv, o, up, down = weights
    attended = compute(DenseCall(x, qkv, dependent=True))[:, :HIDDEN]
    h = compute(DenseCall(attended, o, None, x, dependent=True))
    inner = compute(DenseCall(h, up, activation="silu_mul", dependent=True))
    return compute(DenseCall(inner, down, None, h, dependent=True))


def run_within(call: DenseCall, stages: int, cluster: int) -> Tensor:
    """y of `call` by the rule's launch, but with at most `stages` and, if there is room, at least `cluster` blocks."""
    problem = call.problem()
    cut = dense_gemv.choose_cut(problem)
    groups, chunks = -(-problem.n // (ring.ROWS * cut.warpgroups)), 2 * problem.k // ring.CHUNK_BYTES
    if groups * cluster <= problem.processors:
        cut = replace(cut, cluster=max(cut.cluster, cluster))
    return dense_gemv.run(call, problem, replace(cut, stages=min(cut.stages, stages, chunks // cut.cluster)))


def measure_blocks(floor: Floor, cuts: list[tuple[int, int]]) -> Iterator[dict]:
    """The chain of a block's products, in every one of `cuts`, and by torch."""
    copies = [[torch.randn(n, k, dtype=DTYPE, device="cuda") * 0.02 for n, k in BLOCK] for _ in range(2)]
    nbytes = sum(2 * n * k for n, k in BLOCK)
    n, read = nbytes // (2 * HIDDEN), floor.time(nbytes)  # n: of one product of as many bytes
    for m in (1, 8):
        x = torch.randn(m, HIDDEN, dtype=DTYPE, device="cuda")
        for stages, cluster in cuts:
            compute = partial(run_within, stages=stages, cluster=cluster)
            timing = time_calls([partial(block, x, weights, compute) for weights in copies])
            more = {"dependent": True, "most_stages": stages, "least_cluster": cluster}
            yield row_of("dense_gemv block", True, m, n, HIDDEN, 16, -1, DTYPE, timing, read, **more)
        timing = time_calls([partial(block, x, weights, dense.reference) for weights in copies])
        yield row_of("torch block", False, m, n, HIDDEN, 16, -1, DTYPE, timing, read, dependent=False)


def describe(row: dict) -> str:
    name = row["kernel"] + (" +pdl" if row["dependent"] else "")
    ratio = row["us"] / row["floor_us"]
    cut = ""
    if "stages" in row:
        cut = f"  {row['warpgroups']} x {row['cluster']} x {row['stages']}{' *' if row['chosen'] else ''}"
    if "most_stages" in row:
        cut = f"  at most {row['most_stages']} stages, at least {row['least_cluster']} blocks"
    return (
        f"{row['n']:>6} x {row['k']:<6} m {row['m']:<3} {name:<16} {row['us']:8.2f} us "
        f"({row['us_p10']:.2f} to {row['us_p90']:.2f})  floor {row['floor_us']:7.2f}  {1 / ratio:6.1%} of it{cut}"
    )


def main() -> None:
    """Prints one table and writes its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--sweep", action="store_true", help="time every cut instead")
    parser.add_argument("--output", type=Path, help="of the rows")
    options = parser.parse_args()
    output = options.output or RESULTS / f"dense_gemv{'_sweep' if options.sweep else ''}.jsonl"
    floor = Floor()
    shared = {"read_ceiling_gbs": floor.read_ceiling_gbs(), **run_facts(options.commit)}
    rows: list[dict] = []
    for n, k in (*SHAPES, *random_shapes(2)):
        weights = make_weights(n, k)
        for m in SWEPT_ROWS if options.sweep else ROWS:
            for row in (sweep if options.sweep else measure)(m, weights, floor):
                rows.append({**row, **shared})
                print(describe(row), flush=True)
        write_rows(output, rows)
        del weights
        torch.cuda.empty_cache()
    for row in measure_blocks(floor, BLOCK_CUTS if options.sweep else BLOCK_CUTS[:1]):
        rows.append({**row, **shared})
        print(describe(rows[-1]), flush=True)
    write_rows(output, rows)


if __name__ == "__main__":
    main()
