"""vLLM's products of few rows with the 4-bit experts of a layer, on random weights: Marlin's and Triton's. Without vLLM
there are none."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernel_peers import GROUP, random_scales, random_words

try:
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
    from vllm.scalar_type import scalar_types
except ImportError:
    fused_marlin_moe = None

# x (m, hidden), weights (m, top) float32, experts (m, top) int32 -> (m, hidden)
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def expert_peers(count: int, hidden: int, inner: int, dtype: torch.dtype) -> dict[str, Layer]:
    """Peers' experts by name: gate and up in one, silu, and down, in groups of GROUP."""
    if fused_marlin_moe is None:
        return {}
    return {"marlin": marlin(count, hidden, inner, dtype), "triton": triton(count, hidden, inner, dtype)}


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
