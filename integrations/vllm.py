"""vLLM's quantization `lowbit`: compressed-tensors checkpoints on our kernels.

    vllm serve DIR --quantization lowbit

vLLM finds `register` through the entry point `vllm.general_plugins`. Its own CompressedTensorsConfig decides which
linear has which scheme; only what stores and multiplies a linear's weight is ours, so tensor parallelism, batching,
caching, LoRA and speculative decoding stay vLLM's. Experts and quantized embeddings stay vLLM's too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA16,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from export import compressed_tensors
from export.errors import CheckpointError
from integrations import int8
from quant.kernels import ops
from quant.kernels.packed import TILE_ROWS, PackedWeight, prepack, reason_against_packing
from quant.scheme import Scheme, make_scheme

NAME = "lowbit"
LOADED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class LowbitConfig(CompressedTensorsConfig):
    """compressed-tensors' configuration, its linears given to our kernels."""

    def get_name(self) -> str:
        """What the user asks for."""
        return NAME

    @classmethod
    def get_min_capability(cls) -> int:
        """What our kernels are built for."""
        return 80

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """What our kernels multiply."""
        return [torch.float16, torch.bfloat16]

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`lowbit` where the user asked for it and the checkpoint is of compressed-tensors; else None."""
        ours = user_quant == NAME and hf_quant_cfg.get("quant_method") == compressed_tensors.NAME
        return NAME if ours else None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """vLLM's method for the layer; a linear's scheme is replaced by ours. ValueError where we have none."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, CompressedTensorsLinearMethod):
            layer.scheme = scheme_for(layer.scheme, prefix)
        return method


def scheme_for(theirs: CompressedTensorsScheme, prefix: str) -> CompressedTensorsScheme:
    """Our scheme in the place of vLLM's. ValueError names the linear and what it asks for."""
    in_order = not getattr(theirs, "has_g_idx", False)
    if type(theirs) is CompressedTensorsWNA16 and theirs.num_bits in (4, 8) and in_order:
        return LowbitWNA16(make_scheme(theirs.num_bits, theirs.group_size, bool(theirs.symmetric)))
    if type(theirs) is CompressedTensorsW8A8Int8 and theirs.input_symmetric:
        return LowbitW8A8(theirs.strategy, theirs.is_static_input_scheme, theirs.input_symmetric)
    raise ValueError(
        f"{prefix}: lowbit has no kernel for {type(theirs).__name__}; start vLLM without --quantization lowbit"
    )


class LowbitWNA16(CompressedTensorsScheme):
    """4- or 8-bit weights and 16-bit activations on our kernels."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    @classmethod
    def get_min_capability(cls) -> int:
        """What our kernels are built for."""
        return LowbitConfig.get_min_capability()

    def create_weights(
        self,
        layer: Any,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        """Give `layer` the parameters that the checkpoint's tensors are loaded into, this GPU's part of each.

        ValueError where our kernels cannot pack the part.
        """
        n, k, scheme = sum(output_partition_sizes), input_size_per_partition, self.scheme
        reason = reason_against_packing(n, k, scheme.group_size, TILE_ROWS)
        if reason:
            raise ValueError(f"lowbit cannot run a {scheme} weight: {reason}")
        per_word, groups = 32 // scheme.bits, scheme.groups(k)
        layer.lowbit_shape, layer.lowbit_dtype = (n, k), params_dtype
        words = {"packed_factor": per_word, "weight_loader": weight_loader}
        packed = torch.empty(n, -(-k // per_word), dtype=torch.int32)
        layer.register_parameter(
            "weight_packed", PackedvLLMParameter(data=packed, input_dim=1, output_dim=0, packed_dim=1, **words)
        )
        scales = torch.empty(n, groups, dtype=params_dtype)
        zeros = torch.zeros(-(-n // per_word), groups, dtype=torch.int32)
        shape = torch.empty(2, dtype=torch.int64)
        layer.register_parameter("weight_shape", BasevLLMParameter(data=shape, weight_loader=weight_loader))
        if scheme.group_size == -1:  # every part of the inputs needs the row's scale
            scale: Any = ChannelQuantScaleParameter(data=scales, output_dim=0, weight_loader=weight_loader)
            zero: Any = PackedColumnParameter(data=zeros, output_dim=0, packed_dim=0, **words)
        else:
            scale = GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=weight_loader)
            zero = PackedvLLMParameter(data=zeros, input_dim=1, output_dim=0, packed_dim=0, **words)
        layer.register_parameter("weight_scale", scale)
        if not scheme.symmetric:
            layer.register_parameter("weight_zero_point", zero)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the weight into our kernels' order. CheckpointError where what was loaded is no weight."""
        loaded = {name: getattr(layer, name).data for name in LOADED if hasattr(layer, name)}
        loaded["weight_shape"] = torch.tensor(
            layer.lowbit_shape
        )  # the file's is the whole linear's, ours may be a part
        weight = compressed_tensors.read("", lambda name: loaded[name.removeprefix(".")], self.scheme)
        packed = prepack(weight, layer.lowbit_dtype)
        for name in loaded:
            delattr(layer, name)
        for name, tensor in (("words", packed.words), ("scales", packed.scales), ("zeros", packed.zeros)):
            layer.register_parameter(
                f"lowbit_{name}", None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            )

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        n, k = layer.lowbit_shape
        tensors = layer.lowbit_words, layer.lowbit_scales, layer.lowbit_zeros
        weight = PackedWeight(*tensors, n, k, self.scheme.bits, self.scheme.group_size)
        return ops.linear(x.reshape(-1, k).contiguous(), weight, bias).view(*x.shape[:-1], n)


class LowbitW8A8(CompressedTensorsW8A8Int8):
    """int8 weights and activations: vLLM's loading, torch's integer product (integrations/int8.py)."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded; one scale for a whole matrix becomes every row's. CheckpointError where it is none."""
        n, k = layer.weight.shape
        reason = int8.reason_against(n, k)
        if reason:
            raise CheckpointError(reason)
        scales = layer.weight_scale.data
        if scales.numel() != n:
            widths = torch.tensor(layer.logical_widths, device=scales.device)
            scales = scales.reshape(-1).repeat_interleave(widths).unsqueeze(1)
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        layer.weight_scale = nn.Parameter(scales, requires_grad=False)
        if layer.input_scale is not None:
            layer.input_scale = nn.Parameter(layer.input_scale.data.max(), requires_grad=False)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, x quantized per token or by the calibrated scale."""
        n, k = layer.weight.shape
        y = int8.int8_linear(x.reshape(-1, k), layer.weight, layer.weight_scale, layer.input_scale, bias)
        return y.view(*x.shape[:-1], n)


def register() -> None:
    """Make vLLM know the quantization `lowbit`; vLLM calls this in each of its processes."""
    register_quantization_config(NAME)(LowbitConfig)
