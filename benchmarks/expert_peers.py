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
from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
from vllm.scalar_type import scalar_types

from benchmarks.bench_wna16_experts import DTYPE, SHAPES, Case, timed
from benchmarks.kernel_peers import GROUP, REFUSALS, HummingLayer, random_scales, random_words
from benchmarks.measure import run_facts, write_rows

try:
    from humming.tune import get_heuristics_config
except ImportError:
    get_heuristics_config = None

RESULTS = Path(__file__).with_name("results") / "expert_peers.jsonl"
SIZES = (
    *((shape, 1) for shape in ("qwen3-30b-a3b", "mixtral-8x7b", "glm-4.5-air")),
    *(("qwen3-30b-a3b", rows) for rows in (8, 16)),
    ("mixtral-8x7b", 8),
)

# x (m, hidden), weights (m, top) float32, experts (m, top) int32 -> (m, hidden)
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def marlin(count: int, hidden: int, inner: int, dtype: torch.dtype) -> Layer:
    """Marlin's kernel for mixtures."""
    up, down = random_words(count, hidden // 16, 4 * inner), random_words(count, inner // 16, 2 * hidden)
    up_scales = random_scales(count, hidden // GROUP, 2 * inner, dtype=dtype)
    down_scales = random_scales(count, inner // GROUP, hidden, dtype=dtype)
    workspace = marlin_make_workspace_new(up.device, 4)

    def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        kind = scalar_types.uint4b8.id
        more = {"topk_weights": weights, "topk_ids": experts, "quant_type_id": kind, "workspace": workspace}
        return fused_marlin_moe(x, up, down, None, None, up_scales, down_scales, **more)

    return run


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


def humming(count: int, hidden: int, inner: int, dtype: torch.dtype) -> Layer:
    """Humming's kernel for mixtures, called as vLLM calls it."""
    indexed = {"gemm_type": "indexed"}

    def product(n: int, k: int) -> tuple[HummingLayer, list[tuple[int, int, dict[str, Any]]]]:
        config = {"dtype": "int4", "group_size": GROUP}
        layer = HummingLayer(n, k, config, num_experts=count, torch_dtype=dtype).cuda()
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


PEERS = {"marlin": marlin, "triton": triton} | ({} if HummingLayer is None else {"humming": humming})


def measure(shape: str, m: int, peers: list[str]) -> dict[str, object]:
    """The figures of one layer."""
    layer, scheme = SHAPES[shape], f"int4-g{GROUP}"
    case = Case(layer, scheme, m)
    row = {"shape": shape, "scheme": scheme, "m": m, "distinct": round(case.distinct, 2)}
    row |= {"route_us": timed(lambda i: case.route()), "experts_us": timed(case.experts)}
    row |= {"layer_us": timed(case.whole)}
    for name in peers:
        try:
            run = PEERS[name](layer.count, layer.hidden, layer.inner, DTYPE)
            row[f"{name}_us"] = timed(lambda i, run=run: run(case.x, case.chosen[i].weights, case.chosen[i].experts))
        except REFUSALS as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return row | {"vllm": vllm.__version__}


def main() -> None:
    """Measures all of SIZES."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    facts, rows = run_facts(args.commit), []
    for shape, m in SIZES:
        with torch.inference_mode():
            rows.append(measure(shape, m, args.peers) | facts)
        print(rows[-1], flush=True)
        write_rows(args.output, rows)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
