"""Experts of vLLM's mixtures on lowbit's kernels: few rows by them, more by vLLM's own product of dense weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from lowbit.integrations.arriving import Arriving, Share, placeholder
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import TILE_ROWS, has_kernel, reason_against_packing
from lowbit.quant.kernels.pairs import Chosen
from lowbit.quant.kernels.stack import FEW_ROWS, Experts, PackedStack, StackedLinear, load_stack
from lowbit.quant.kernels.wna16_experts import WHOLE_BITS, Gate
from lowbit.quant.scheme import Scheme

GATES = {"silu": Gate("silu_mul"), "gelu_tanh": Gate("gelu_tanh_mul")}  # by vLLM's names
SHARDS = {"w1": 0, "w3": 1}  # gate and up


def reason_against_experts(layer: Any, schemes: Sequence[Scheme | None]) -> str | None:
    """The reason why our kernels do not multiply with the experts of a layer, or None.

    schemes  of gate, up and down
    """
    config, scheme = layer.moe_config, schemes[0]
    if scheme is None or len(set(schemes)) > 1:
        return f"gate, up and down have the schemes {', '.join(map(str, schemes))}"
    if not has_kernel(scheme) or scheme.bits not in WHOLE_BITS:
        return f"{scheme}: the kernel of experts takes numbers of {' and '.join(map(str, WHOLE_BITS))} bits"
    if scheme.inputs is not None:
        return f"{scheme}: the kernel of experts does not round inputs"
    if layer.activation.value not in GATES or config.has_bias:
        return f"activation {layer.activation.value!r}{' with biases' if config.has_bias else ''}"
    if layer.apply_router_weight_on_input or config.moe_parallel_config.use_ep or config.is_lora_enabled:
        return "they are weighted before the first product, shared out by expert parallelism, or have adapters"
    inner, hidden, size = config.intermediate_size_per_partition, config.hidden_dim, scheme.group_size
    reason = reason_against_packing(2 * inner, hidden, size, 2 * inner)
    if reason is None and hidden % TILE_ROWS:
        reason = f"{hidden} outputs: the kernel of experts takes multiples of {TILE_ROWS}"
    return reason or reason_against_packing(hidden, inner, size, TILE_ROWS)


class LowbitExperts(FusedMoEMethodBase):
    """The experts of a layer: load, stack, pack, multiply.

    prefix  name of the experts
    roles   names of gate, up and down in the checkpoint
    """

    def __init__(self, moe: Any, prefix: str, roles: tuple[str, str, str], scheme: Scheme) -> None:
        super().__init__(moe)
        self.prefix, self.roles, self.scheme = prefix, roles, scheme
        self.experts: Experts | None = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        """Register a parameter for each kind of tensor of the checkpoint, empty until all tensors are there."""
        gate, up, down = self.roles
        inner, ranks, rank = intermediate_size_per_partition, self.moe.tp_size, self.moe.tp_rank
        numbers = range(num_experts)
        first = [f"{self.prefix}.{expert}.{role}" for expert in numbers for role in (gate, up)]
        last = [f"{self.prefix}.{expert}.{down}" for expert in numbers]
        self.arriving = {
            "w13": Arriving(first, [self.scheme] * len(first), hidden_size),
            "w2": Arriving(last, [self.scheme] * len(last), inner * ranks),
        }
        self.shares = {
            "w13": Share((inner,) * len(first), hidden_size, rank, ranks),
            "w2": Share((hidden_size,) * len(last), inner, rank, ranks),
        }
        self.count, self.dtype, self.gate = num_experts, params_dtype, GATES[layer.activation.value]
        self.parameters = {f"{w}_{s}": (w, s) for w, arriving in self.arriving.items() for s in arriving.suffixes}
        for name, (which, suffix) in self.parameters.items():
            layer.register_parameter(name, placeholder(partial(self._load, which, suffix)))

    def _load(
        self,
        which: str,
        suffix: str,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take a tensor of one expert."""
        part = expert_id if which == "w2" else 2 * expert_id + SHARDS[shard_id]
        self.arriving[which].put(suffix, loaded_weight, part)
        return True if return_success else None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the packed experts in the place of the loaded tensors. CheckpointError if some of them never came."""
        device = getattr(layer, next(iter(self.parameters))).device
        up, down = (self._stack(which, device) for which in ("w13", "w2"))
        for name in self.parameters:
            delattr(layer, name)
        self.experts = Experts(StackedLinear(up), StackedLinear(down), self.gate)
        for which, stack in (("w13", up), ("w2", down)):
            for name in ("words", "scales", "zeros", "factors"):
                tensor = getattr(stack.weight, name)
                if tensor is not None:
                    layer.register_parameter(f"{which}_{name}", nn.Parameter(tensor, requires_grad=False))

    def _stack(self, which: str, device: torch.device) -> PackedStack:
        """The experts' share of one product in the kernels' layout."""
        joined = self.arriving[which].joined(self.shares[which], self.dtype, device)
        stack = load_stack(joined.weight, self.count, self.dtype, paired=which == "w13")
        assert isinstance(stack, PackedStack), joined.reason
        return stack

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """None: the kernels are not vLLM's."""
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The sum (m, hidden) over each row's experts of x (m, hidden)."""
        experts = self.experts
        assert experts is not None
        assert experts.weights is not None
        if len(x) <= FEW_ROWS or not x.is_cuda:  # vLLM's product needs Triton
            chosen = Chosen(topk_ids.int().contiguous(), topk_weights.float().contiguous(), self.count)
            return experts(x, chosen, dependent=True)
        w13, w2 = (ops.dequantize(weight).unflatten(0, (self.count, -1)) for weight in experts.weights)
        return fused_moe.fused_experts(x, w13, w2, topk_weights, topk_ids, activation=layer.activation)
