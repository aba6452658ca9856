"""Cases, peers and rows shared by the benchmarks of products with inputs in 8 bits, int8 or FP8.

`part` says what a row times: "product" from x in codes on, "rounding + product" from half-precision x on, and "norm +
rounding + product" from x before its norm. Kernel and launch come from the one rule. `dependent` rows are launched with
programmatic dependent launch; the floor is a reader of W and its scales without it.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernel_peers import random_words, vllm_ops
from benchmarks.measure import Floor, copies_for, run_facts, time_calls, write_rows
from benchmarks.wna16 import RESULTS, SHAPES, random_shapes, row_of
from lowbit.quant.kernels import ops, w8a8
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.row_norm import GROUP, Rows
from lowbit.quant.kernels.w8a8 import W8a8Call, W8a8Weight, block_sides
from lowbit.quant.numbers import INT8, Number

try:
    from vllm.third_party import deep_gemm  # it compiles a kernel for every shape at its first call
except ImportError:
    deep_gemm = None

PRODUCT, ROUNDED, NORMED = "product", "rounding + product", "norm + rounding + product"
DTYPE = torch.bfloat16  # as the peers have it
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """A kernel's name, whose it is, what it times, how it is launched, and its calls."""

    name: str
    ours: bool
    part: str
    calls: Calls
    dependent: bool = False


@dataclass(frozen=True)
class Inputs:
    """Inputs of all cases of a shape: x (m, k) in half precision, a norm's weight (k), copies of W."""

    x: torch.Tensor
    gamma: torch.Tensor
    weights: list[W8a8Weight]


def make_inputs(number: Number, in_blocks: bool, m: int, n: int, k: int) -> Inputs:
    x, gamma = torch.randn(m, k, dtype=DTYPE, device="cuda"), torch.ones(k, dtype=DTYPE, device="cuda")
    copies, sides = range(copies_for(n * k)), block_sides(n, k) if in_blocks else (n,)
    codes = [random_codes(number, n, k) for _ in copies]
    return Inputs(x, gamma, [W8a8Weight(each, torch.rand(sides, device="cuda") * 0.01) for each in codes])


def random_codes(number: Number, n: int, k: int) -> torch.Tensor:
    """Codes (n, k) over the number's range; of FP8 all but its NaNs."""
    codes = random_words(n, k, dtype=torch.int8)
    return codes if number == INT8 else codes.masked_fill_(codes & 0x7F == 0x7F, 0).view(number.storage)


def our_cases(inputs: Inputs, launches: Sequence[bool]) -> Iterator[Case]:
    rounded_rows = Rows(inputs.x, rounding=inputs.weights[0].number.name, grouped=inputs.weights[0].in_blocks)
    codes, scales = ops.quantize_rows(rounded_rows)
    name = choose_kernel(W8a8Call(codes, scales, inputs.weights[0], dtype=DTYPE).problem()).name

    def multiplied(rows: Rows, weight: W8a8Weight) -> torch.Tensor:
        x, x_scales = ops.quantize_rows(rows)
        return ops.w8a8_linear(W8a8Call(x, x_scales, weight, dtype=DTYPE, dependent=True))

    for d in launches:
        product = [
            lambda w=w, d=d: ops.w8a8_linear(W8a8Call(codes, scales, w, dtype=DTYPE, dependent=d))
            for w in inputs.weights
        ]
        yield Case(name, True, PRODUCT, product, d)
        rows = replace(rounded_rows, dependent=d)
        rounded = [lambda w=w, rows=rows: multiplied(rows, w) for w in inputs.weights]
        yield Case(name, True, ROUNDED, rounded, d)
        rows = replace(rows, norm="rms", weight=inputs.gamma, eps=1e-5)
        yield Case(name, True, NORMED, [lambda w=w, rows=rows: multiplied(rows, w) for w in inputs.weights], d)


def torch_cases(inputs: Inputs) -> Iterator[Case]:
    """torch's product, inputs rounded in advance: of int8 padded, without scaling of the sums; of FP8 scaled, with sums
    in the tensor cores' own accumulator ("fast") and in float32; cuBLAS in bfloat16."""
    m, k = inputs.x.shape
    n = inputs.weights[0].n
    if inputs.weights[0].number == INT8:
        x = random_words(max(m, 32), k, dtype=torch.int8)
        yield Case("torch._int_mm", False, PRODUCT, [lambda w=w: torch._int_mm(x, w.codes.T) for w in inputs.weights])
    elif inputs.weights[0].in_blocks:
        codes = ops.quantize_rows(Rows(inputs.x, rounding="fp8", grouped=True))
        calls = [W8a8Call(*codes, w, dtype=DTYPE) for w in inputs.weights]
        yield Case("torch scaled_mm", False, PRODUCT, [lambda call=call: w8a8.scaled(call) for call in calls])
    else:
        x, scales = ops.quantize_rows(Rows(inputs.x, rounding="fp8"))
        for name, fast in (("torch._scaled_mm fast", True), ("torch._scaled_mm", False)):

            def scaled(w: W8a8Weight, fast: bool = fast) -> torch.Tensor:
                sides = scales.unsqueeze(1), w.scales.unsqueeze(0)
                return torch._scaled_mm(x, w.codes.T, *sides, out_dtype=DTYPE, use_fast_accum=fast)

            yield Case(name, False, PRODUCT, [lambda w=w, scaled=scaled: scaled(w) for w in inputs.weights])
    dense = [torch.randn(n, k, dtype=DTYPE, device="cuda") for _ in range(copies_for(2 * n * k))]
    yield Case("cublas", False, ROUNDED, [lambda w=w: torch.nn.functional.linear(inputs.x, w) for w in dense])


def block_cases(inputs: Inputs) -> Iterator[Case]:
    """Products in blocks by vLLM's CUTLASS and DeepGEMM, inputs rounded in advance, without what these refuse."""
    codes, scales = ops.quantize_rows(Rows(inputs.x, rounding="fp8", grouped=True))
    (m, k), n = codes.shape, inputs.weights[0].n
    aligned = torch.empty_strided((m, k // GROUP), (1, m + -m % 4), device="cuda").copy_(scales.T)
    blocks = [(w.codes, w.scales[:, : k // GROUP].contiguous()) for w in inputs.weights]
    y = torch.empty(m, n, dtype=DTYPE, device="cuda")
    peers: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {}
    if vllm_ops is not None:
        peers["vllm cutlass"] = lambda w, s: vllm_ops.cutlass_scaled_mm(codes, w.T, scales.T, s.T, DTYPE)
    if deep_gemm is not None:
        peers["deepgemm"] = lambda w, s: deep_gemm.fp8_gemm_nt((codes, aligned), (w, s), y, disable_ue8m0_cast=True)
    for name, product in peers.items():
        try:
            product(*blocks[0])
        except (AssertionError, RuntimeError) as error:
            print(f"{name} with {m} rows: {str(error)[:300]}", flush=True)
            continue
        yield Case(name, False, PRODUCT, [lambda w=w, s=s, product=product: product(w, s) for w, s in blocks])


def vllm_cases(inputs: Inputs) -> Iterator[Case]:
    if inputs.weights[0].in_blocks:
        yield from block_cases(inputs)
        return
    if vllm_ops is None:
        return
    integers = inputs.weights[0].number == INT8

    def in_codes() -> tuple[torch.Tensor, torch.Tensor]:
        if integers:
            return vllm_ops.scaled_int8_quant(inputs.x)[:2]
        return vllm_ops.scaled_fp8_quant(inputs.x, use_per_token_if_dynamic=True)

    codes, scales = in_codes()

    def product(weight: W8a8Weight) -> torch.Tensor:
        return vllm_ops.cutlass_scaled_mm(codes, weight.codes.T, scales, weight.scales.unsqueeze(0), DTYPE)

    def rounded(weight: W8a8Weight) -> torch.Tensor:
        x, x_scales = in_codes()
        return vllm_ops.cutlass_scaled_mm(x, weight.codes.T, x_scales, weight.scales.unsqueeze(0), DTYPE)

    yield Case("vllm cutlass", False, PRODUCT, [lambda w=w: product(w) for w in inputs.weights])
    yield Case("vllm cutlass", False, ROUNDED, [lambda w=w: rounded(w) for w in inputs.weights])


def describe(row: dict) -> str:
    name = row["kernel"] + (" +pdl" if row["dependent"] else "")
    tops = 2e-6 * row["m"] * row["n"] * row["k"] / row["us"]
    ratio = row["us"] / row["floor_us"]
    return (
        f"{row['n']:>6} x {row['k']:<6} m {row['m']:<4} {name:<18} {row['part']:<27} {row['us']:8.2f} us "
        f"({row['us_p10']:.2f} to {row['us_p90']:.2f})  floor {row['floor_us']:7.2f}  x {ratio:.3f}"
        f"  {tops:6.0f} TOP/s"
    )


@dataclass(frozen=True)
class Plan:
    """The cases of a benchmark: rows of x, selected named shapes, and additional random shapes."""

    stem: str
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...] = SHAPES
    random_shapes: int = 5
    launches: tuple[bool, ...] = (False, True)
    number: Number = INT8
    in_blocks: bool = False


def run_plan(plan: Plan, description: str | None) -> None:
    """Prints one table and writes benchmarks/results/<stem>.jsonl."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{plan.stem}.jsonl")
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(plan.shapes)), help="places in plan.shapes")
    parser.add_argument("--rows", nargs="+", type=int, default=plan.rows, help="of x")
    options = parser.parse_args()
    floor = Floor()
    shared = {"read_ceiling_gbs": floor.read_ceiling_gbs(), **run_facts(options.commit)}
    rows: list[dict] = []
    for n, k in (*(plan.shapes[i] for i in options.shapes), *random_shapes(plan.random_shapes)):
        read = floor.time(n * k + 4 * n)
        for m in options.rows:
            inputs = make_inputs(plan.number, plan.in_blocks, m, n, k)
            for case in (*our_cases(inputs, plan.launches), *torch_cases(inputs), *vllm_cases(inputs)):
                more = {"part": case.part, "dependent": case.dependent}
                timing = time_calls(case.calls)
                bits = 16 if case.name == "cublas" else 8
                group = GROUP if plan.in_blocks else -1
                row = row_of(case.name, case.ours, m, n, k, bits, group, DTYPE, timing, read, **more)
                rows.append({**row, **shared})
                print(describe(rows[-1]), flush=True)
            write_rows(options.output, rows)
        torch.cuda.empty_cache()
