"""Shapes, timing, peers and rows shared by the benchmarks of products with a packed weight.

Kernel and launch come from the one rule, choose_kernel and its choose_cut; nothing is searched. `dependent` rows are
launched with programmatic dependent launch, in the same chain of calls on other copies of the weight; the floor is a
reader without it.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernel_peers import PEERS, Peer
from benchmarks.measure import CALLS, Floor, Timing, copies_for, run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops, panels
from lowbit.quant.kernels.packed import PackedWeight, prepack
from lowbit.quant.kernels.problem import PackedCall
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.wna16_gemv import prefers_panels
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import make_scheme

# Llama-2 7B, Llama-3 8B, Llama-2 13B, CodeGeeX-13B, Llama-3 70B: outputs x inputs.
SHAPES = (
    (4096, 4096),
    (12288, 4096),
    (22016, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (5120, 5120),
    (15360, 5120),
    (20480, 5120),
    (5120, 20480),
    (27648, 5120),
    (5120, 13824),
    (57344, 8192),
    (8192, 28672),
)
# Bits, group size, symmetric, dtype: the main scheme, then its variants.
MAIN = (4, 128, True, torch.float16)
VARIANTS = (
    (4, 128, True, torch.bfloat16),
    (4, 128, False, torch.float16),
    (4, 64, True, torch.float16),
    (4, 32, True, torch.float16),
)
CHANNEL = (8, -1, True, torch.float16)
VARIANT_SHAPES = ((4096, 4096), (28672, 4096))
# Hidden size, rows of q, k and v, inner size: Llama-2 7B, 13B, Llama 70B.
BLOCKS = ((4096, 12288, 11008), (5120, 15360, 13824), (8192, 10240, 28672))
RESULTS = Path(__file__).with_name("results")


def random_shapes(count: int) -> list[tuple[int, int]]:
    """Random shapes that nothing was tuned for: n a multiple of 64, k of 128."""
    return [(64 * random.randint(32, 512), 128 * random.randint(16, 128)) for _ in range(count)]


def bytes_of(n: int, k: int, bits: int, group_size: int, symmetric: bool = True) -> int:
    """Codes, 16-bit scales and 8-bit zeros: what a product must read."""
    groups = 1 if group_size == -1 else k // group_size
    return n * k * bits // 8 + n * groups * (2 if symmetric else 3)


def make_weight(n: int, k: int, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> PackedWeight:
    weight = torch.randn(n, k, device="cuda") * 0.02
    return prepack(round_to_nearest(weight, make_scheme(bits, group_size, symmetric), dtype), dtype)


def make_copies(n: int, k: int, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> list[PackedWeight]:
    """Copies of one packed weight, enough to evict each from L2 before its next use."""
    packed = make_weight(n, k, bits, group_size, symmetric, dtype)
    count = copies_for(bytes_of(n, k, bits, group_size, symmetric))
    zeros = packed.zeros
    return [
        replace(
            packed,
            words=packed.words.clone(),
            scales=packed.scales.clone(),
            zeros=None if zeros is None else zeros.clone(),
        )
        for _ in range(count)
    ]


def inputs_for(weight: PackedWeight, m: int) -> Tensor:
    """m rows, in panels where a step has them so."""
    x = torch.randn(m, weight.k, dtype=weight.dtype, device="cuda")
    return panels.panels_of(x) if prefers_panels(PackedCall(x, weight).problem()) else x


def time_ours(copies: Sequence[PackedWeight], x: Tensor, dependent: bool) -> tuple[str, Timing]:
    """The kernel that the rule chooses, and its time."""
    kernel = choose_kernel(PackedCall(x, copies[0]).problem()).name
    return kernel, time_calls([lambda w=w: ops.linear(PackedCall(x, w, dependent=dependent)) for w in copies])


def row_of(
    name: str,
    ours: bool,
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    timing: Timing,
    floor: Timing,
    **more: object,
) -> dict:
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "kernel": name,
        "ours": ours,
        "m": m,
        "n": n,
        "k": k,
        "dtype": dtype_name,
        "bits": bits,
        "group_size": group_size,
        **asdict(timing),
        "floor_us": floor.us,
        **more,
    }


def measure_ours(floor: Floor, n: int, k: int, scheme: tuple, rows: Sequence[int]) -> list[dict]:
    bits, group_size, symmetric, dtype = scheme
    copies = make_copies(n, k, *scheme)
    read = floor.time(bytes_of(n, k, bits, group_size, symmetric))
    measured = []
    for m in rows:
        x = inputs_for(copies[0], m)
        for dependent in (False, True):
            kernel, timing = time_ours(copies, x, dependent)
            more = {"dependent": dependent, "symmetric": symmetric, "panels": x.ndim == 3}
            measured.append(row_of(kernel, True, m, n, k, bits, group_size, dtype, timing, read, **more))
    return measured


def measure_peer(
    peer: Peer, floor: Floor, n: int, k: int, rows: Sequence[int], calls_in_graph: int = CALLS
) -> list[dict]:
    measured = []
    group_size = 128 if peer.bits == 4 else -1
    read = floor.time(bytes_of(n, k, peer.bits, group_size))
    for m in rows:
        if m > peer.most_rows:
            continue
        try:
            timing = time_calls(peer.calls(m, n, k), calls_in_graph=calls_in_graph)
        except (RuntimeError, ValueError) as error:
            print(f"{peer.name} {m} {n} x {k}: {str(error).splitlines()[0]}")
            continue
        measured.append(row_of(peer.name, False, m, n, k, peer.bits, group_size, peer.dtype, timing, read))
    return measured


def measure_chain(hidden: int, qkv: int, inner: int, floor: Floor) -> dict:
    """A block's four projections, W4 g128, m = 1, each fed by the one before it, with dependent launch."""
    sizes = ((qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
    nbytes = sum(bytes_of(n, k, 4, 128) for n, k in sizes)
    blocks = []
    for _ in range(max(3, copies_for(nbytes))):
        weights = [make_weight(n, k, *MAIN) for n, k in sizes]
        blocks.append([*weights[:2], replace(weights[2], pair_block=2 * inner), weights[3]])
    state = [torch.randn(1, hidden, dtype=torch.float16, device="cuda") * 0.01]

    def run(block: list[PackedWeight]) -> None:
        q = ops.linear(PackedCall(state[0], block[0], dependent=True))[:, :hidden]
        h = ops.linear(PackedCall(q, block[1], residual=state[0], dependent=True))
        inner = ops.linear(PackedCall(h, block[2], activation="silu_mul", dependent=True))
        state[0] = ops.linear(PackedCall(inner, block[3], residual=h, dependent=True))

    timing = time_calls([lambda block=block: run(block) for block in blocks])
    return row_of(
        "wna16_gemv block",
        True,
        1,
        2 * inner,
        hidden,
        4,
        128,
        torch.float16,
        timing,
        floor.time(nbytes),
        dependent=True,
        symmetric=True,
        gbs=round(nbytes / timing.us / 1e3, 1),
    )


def describe(row: dict) -> str:
    name = row["kernel"] + (" +pdl" if row.get("dependent") else "") + ("" if row.get("symmetric", True) else " asym")
    ratio = row["us"] / row["floor_us"]
    return (
        f"{row['n']:>6} x {row['k']:<6} m {row['m']:<3} {name:<22} w{row['bits']:<2} g{row['group_size']:<4}"
        f"{row['dtype']:<9} {row['us']:8.2f} us ({row['us_p10']:.2f} to {row['us_p90']:.2f})"
        f"  floor {row['floor_us']:7.2f}  x {ratio:.3f}"
    )


@dataclass(frozen=True)
class Plan:
    """The cases of a benchmark: rows of x for our kernel alone, rows for the main scheme and for W8 per channel, rows
    of the variants on two shapes, and whether a block's projections come last."""

    stem: str
    baseline: tuple[int, ...]
    rows: tuple[int, ...]
    channel_rows: tuple[int, ...]
    variant_rows: tuple[int, ...]
    blocks: bool


def run_plan(plan: Plan, description: str | None) -> None:
    """Prints one table and writes benchmarks/results/<stem>.jsonl."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{plan.stem}.jsonl")
    parser.add_argument("--random-shapes", type=int, default=5)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="of the named ones, from the first")
    options = parser.parse_args()
    floor = Floor()
    shared = {"read_ceiling_gbs": floor.read_ceiling_gbs(), **run_facts(options.commit)}
    rows: list[dict] = []

    def add(measured: Sequence[dict]) -> None:
        for row in measured:
            rows.append({**row, **shared})
            print(describe(rows[-1]), flush=True)
        write_rows(options.output, rows)

    for i, (n, k) in enumerate((*SHAPES[: options.shapes], *random_shapes(options.random_shapes))):
        add(measure_ours(floor, n, k, MAIN, plan.baseline + plan.rows))
        add(measure_ours(floor, n, k, CHANNEL, plan.baseline + plan.channel_rows))
        for peer in PEERS:
            if i >= peer.most_shapes:
                continue
            add(measure_peer(peer, floor, n, k, {4: plan.rows, 8: plan.channel_rows, 16: plan.rows[:1]}[peer.bits]))
        torch.cuda.empty_cache()
    for n, k in VARIANT_SHAPES:
        for scheme in (MAIN, *VARIANTS):
            add(measure_ours(floor, n, k, scheme, plan.variant_rows))
    if plan.blocks:
        add([measure_chain(*block, floor) for block in BLOCKS])
