"""The 4-bit experts of a layer, ours and other libraries', on random weights: for few rows, with the same choices.

    python -m benchmarks.expert_peers --commit $(git rev-parse --short HEAD) [--peers triton]

needs vLLM beside lowbit, and Humming for its figures. Rows go to benchmarks/results/expert_peers.jsonl: microseconds in
a graph of the choice, of up and down together, of all three, and of each peer's up and down.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config, mxfp4_w4a16_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts import gpt_oss_triton_kernels_moe as ogs
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
from vllm.model_executor.layers.quantization.utils.mxfp4_utils import _swizzle_mxfp4
from vllm.scalar_type import scalar_types

from benchmarks.bench_wna16_experts import DTYPE, SHAPES, Case, timed
from benchmarks.kernel_peers import E8M0, GROUP, REFUSALS, HummingLayer, random_scales, random_words
from benchmarks.measure import run_facts, write_rows

try:
    from humming.tune import get_heuristics_config
except ImportError:
    get_heuristics_config = None

RESULTS = Path(__file__).with_name("results") / "expert_peers.jsonl"
INT4, MXFP4 = f"int4-g{GROUP}", "mxfp4-a16"
PEER_NAMES = ("marlin", "triton", "humming")
SIZES = (
    *((INT4, shape, 1) for shape in ("qwen3-30b-a3b", "mixtral-8x7b", "glm-4.5-air")),
    *((INT4, "qwen3-30b-a3b", rows) for rows in (8, 16)),
    (INT4, "mixtral-8x7b", 8),
    *((MXFP4, "gpt-oss-20b", rows) for rows in (1, 8, 16)),
    *((MXFP4, "qwen3-30b-a3b", rows) for rows in (1, 16)),
)

# x (m, hidden), weights (m, top) float32, experts (m, top) int32 -> (m, hidden)
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Maker = Callable[[int, int, int, torch.dtype], Layer]


def marlin(kind: str, group: int, scale: torch.dtype | None = None, pad: int = 1) -> Maker:
    """Marlin's kernel for mixtures with weights of vLLM's type `kind`; sizes are rounded up to multiples of `pad`."""

    def make(count: int, hidden: int, inner: int, dtype: torch.dtype) -> Layer:
        hidden, inner = -(-hidden // (2 * pad)) * 2 * pad, -(-inner // pad) * pad
        up, down = random_words(count, hidden // 16, 4 * inner), random_words(count, inner // 16, 2 * hidden)
        up_scales = random_scales(count, hidden // group, 2 * inner, dtype=scale or dtype)
        down_scales = random_scales(count, inner // group, hidden, dtype=scale or dtype)
        workspace = marlin_make_workspace_new(up.device, 4)

        def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
            more = {"topk_weights": weights, "topk_ids": experts, "workspace": workspace}
            more |= {"quant_type_id": getattr(scalar_types, kind).id}
            rows = x if x.shape[1] == hidden else torch.nn.functional.pad(x, (0, hidden - x.shape[1]))
            return fused_marlin_moe(rows, up, down, None, None, up_scales, down_scales, **more)

        return run

    return make


def triton(count: int, hidden: int, inner: int, dtype: torch.dtype) -> Layer:
    """Triton's kernel for mixtures."""
    up = random_words(count, 2 * inner, hidden // 2, dtype=torch.uint8)
    down = random_words(count, hidden, inner // 2, dtype=torch.uint8)
    scales = (
        random_scales(count, 2 * inner, hidden // GROUP, dtype=dtype),
        random_scales(count, hidden, inner // GROUP, dtype=dtype),
    )
    config = int4_w4a16_moe_quant_config(*scales, block_shape=[0, GROUP])
    return lambda x, weights, experts: fused_experts(x, up, down, weights, experts, quant_config=config)


def ogs_triton(count: int, hidden: int, inner: int, dtype: torch.dtype) -> Layer:
    """Triton's kernels for MXFP4, OpenAI's, which vLLM takes for it on Hopper. Its activation is gpt-oss's."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig  # vLLM makes it importable

    def weight(n: int, k: int) -> tuple[Any, Any]:
        codes = random_words(count, n, k // 2, dtype=torch.uint8)
        exponents = torch.full((count, n, k // 32), 120, dtype=torch.uint8, device=codes.device)
        words, flex, scales = _swizzle_mxfp4(codes, exponents)
        return words, PrecisionConfig(weight_scale=scales, flex_ctx=FlexCtx(rhs_data=flex))

    (up, up_scales), (down, down_scales) = weight(2 * inner, hidden), weight(hidden, inner)
    config = mxfp4_w4a16_moe_quant_config(up_scales, down_scales)

    def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        routing = ogs.make_routing_data(experts, weights, count)
        return ogs.triton_kernel_fused_experts(
            torch.empty_like(x), x, up, down, *routing, topk=experts.shape[1], quant_config=config
        )

    return run


def humming(**weight: object) -> Maker:
    """Humming's kernel for mixtures, called as vLLM calls it; `weight` is its weight_config."""
    indexed = {"gemm_type": "indexed"}

    def make(count: int, hidden: int, inner: int, dtype: torch.dtype) -> Layer:
        def product(n: int, k: int) -> tuple[HummingLayer, list[tuple[int, int, dict[str, Any]]]]:
            layer = HummingLayer(n, k, dict(weight), num_experts=count, torch_dtype=dtype).cuda()
            layer.load_from_unquantized(torch.randn(count, n, k, dtype=dtype, device="cuda") * 0.02)
            layer.transform()
            return layer, get_heuristics_config(layer.humming_config, **indexed)

        (up, up_tuning), (down, down_tuning) = product(2 * inner, hidden), product(hidden, inner)

        def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
            pairs = experts.numel()
            [block] = [each["block_shape"][0] for least, most, each in up_tuning if least < pairs <= most]
            names = ("sorted_ids", "expert_ids", "num_tokens_padded")
            sorting = dict(zip(names, moe_align_block_size(experts, block, count), strict=True))
            more = {**sorting, "compute_config": indexed, "valid_shape_m": pairs}
            both = up(x, top_k=experts.shape[1], tuning_config=up_tuning, **more)
            middle = x.new_empty(pairs, inner)
            torch.ops._C.silu_and_mul(middle, both)
            y = down(middle, top_k=1, tuning_config=down_tuning, **more)
            return moe_fused_mul_sum(y.view(*experts.shape, hidden), weights)

        return run

    return make


PEERS: dict[str, dict[str, Maker]] = {
    INT4: {"marlin": marlin("uint4b8", GROUP), "triton": triton},
    MXFP4: {"marlin": marlin("float4_e2m1f", 32, E8M0, pad=128), "triton": ogs_triton},
}
if HummingLayer is not None:
    PEERS[INT4]["humming"] = humming(dtype="int4", group_size=GROUP)
    PEERS[MXFP4]["humming"] = humming(dtype="float4e2m1", group_size=32, scale_dtype="float8e8m0")


def measure(scheme: str, shape: str, m: int, peers: list[str]) -> dict[str, object]:
    """The figures of one layer."""
    layer = SHAPES[shape]
    case = Case(layer, scheme, m)
    row = {"shape": shape, "scheme": scheme, "m": m, "distinct": round(case.distinct, 2)}
    row |= {"route_us": timed(lambda i: case.route()), "experts_us": timed(case.experts)}
    row |= {"layer_us": timed(case.whole)}
    for name, make in PEERS[scheme].items():
        if name not in peers:
            continue
        try:
            run = make(layer.count, layer.hidden, layer.inner, DTYPE)
            row[f"{name}_us"] = timed(lambda i, run=run: run(case.x, case.chosen[i].weights, case.chosen[i].experts))
        except REFUSALS as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return row | {"vllm": vllm.__version__}


def main() -> None:
    """Measures all of SIZES, or some of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--sizes", nargs="+", type=int, default=range(len(SIZES)), help="places in SIZES")
    parser.add_argument("--peers", nargs="+", choices=PEER_NAMES, default=list(PEER_NAMES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    facts, rows = run_facts(args.commit), []
    for i in args.sizes:
        with torch.inference_mode():
            rows.append(measure(*SIZES[i], args.peers) | facts)
        print(rows[-1], flush=True)
        write_rows(args.output, rows)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
