"""vLLM's quantization method `lowbit`: compressed-tensors checkpoints with lowbit's kernels.

    vllm serve DIR --quantization lowbit

vLLM finds `register` through the entry point `vllm.general_plugins`. Its own CompressedTensorsConfig decides the scheme
of each linear. Only storage and multiplication of a linear's weight are replaced; tensor parallelism, batching,
caching, LoRA and speculative decoding stay vLLM's. So do experts and quantized embeddings.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)

from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.quant.kernels import w8a8
from lowbit.quant.kernels.packed import TILE_ROWS, prepack, reason_against_packing
from lowbit.quant.kernels.weight import Hints, Int8, Linear, Packed, RoundedInputs
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import INPUTS, Scheme, make_scheme

NAME = "lowbit"
DEPENDENT = Hints(dependent=True)


class LowbitConfig(CompressedTensorsConfig):
    """compressed-tensors' configuration, with linears run by lowbit's kernels."""

    def get_name(self) -> str:
        """The name that the user passes."""
        return NAME

    @classmethod
    def get_min_capability(cls) -> int:
        """The lowest compute capability of the kernels."""
        return 80

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """The activation dtypes of the kernels."""
        return [torch.float16, torch.bfloat16]

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`lowbit` if the user asks for it and the checkpoint is in compressed-tensors format, otherwise None."""
        ours = user_quant == NAME and hf_quant_cfg.get("quant_method") == COMPRESSED_TENSORS.method
        return NAME if ours else None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """vLLM's method for the layer, with a linear's scheme replaced by ours. ValueError if there is no kernel for
        it."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, CompressedTensorsLinearMethod):
            layer.scheme = scheme_for(layer.scheme, prefix)
        return method


def scheme_for(theirs: CompressedTensorsScheme, prefix: str) -> "LowbitScheme":
    """lowbit's scheme in place of vLLM's. ValueError with the linear's name if there is no kernel for it."""
    in_order = not getattr(theirs, "has_g_idx", False)
    if type(theirs) is CompressedTensorsWNA16 and theirs.num_bits in (4, 8) and in_order:
        return PackedWeights(make_scheme(theirs.num_bits, theirs.group_size, bool(theirs.symmetric)))
    if type(theirs) is CompressedTensorsW8A8Int8 and theirs.input_symmetric:
        inputs = INPUTS["a8tensor" if theirs.is_static_input_scheme else "a8token"]
        return PlainWeights(replace(make_scheme(8, -1, True), inputs=inputs), theirs.strategy == "tensor")
    raise ValueError(
        f"{prefix}: lowbit has no kernel for {type(theirs).__name__}; start vLLM without --quantization lowbit"
    )


@dataclass(frozen=True)
class Part:
    """This rank's shard of a linear, or of several that vLLM fuses.

    widths  outputs of each fused linear
    k       inputs
    dtype   of activations
    loader  loads this shard's part of a checkpoint tensor into a parameter
    """

    widths: list[int]
    k: int
    dtype: torch.dtype
    loader: Callable[..., None]

    @property
    def n(self) -> int:
        return sum(self.widths)


class LowbitScheme(CompressedTensorsScheme):
    """A quantized linear with lowbit's kernels: load, pack, multiply.

    Subclasses define the parameters to load, their packed form, and the product.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    @classmethod
    def get_min_capability(cls) -> int:
        """The lowest compute capability of the kernels."""
        return LowbitConfig.get_min_capability()

    @abstractmethod
    def reason_against(self, part: Part) -> str | None:
        """The reason why the kernels cannot multiply with the shard, or None."""

    @abstractmethod
    def parameters(self, part: Part) -> dict[str, BasevLLMParameter]:
        """The parameters that the checkpoint's tensors are loaded into, by name."""

    @abstractmethod
    def packed(self, weight: QTensor, part: Part) -> dict[str, Tensor | None]:
        """The packed tensors that the layer keeps, named as in vLLM's own schemes, where its LoRA looks for the
        weight."""

    def create_weights(
        self,
        layer: Any,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        """Register the shard's parameters on `layer`. ValueError if the kernels cannot pack the shard."""
        part = Part(output_partition_sizes, input_size_per_partition, params_dtype, weight_loader)
        reason = self.reason_against(part)
        if reason:
            raise ValueError(f"lowbit cannot run a {self.scheme} weight: {reason}")
        parameters = self.parameters(part)
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)
        layer.lowbit_part, layer.lowbit_loaded = part, tuple(parameters)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the loaded weight into the kernels' layout. CheckpointError if the loaded tensors are not a valid
        weight."""
        loaded = self.whole({name: getattr(layer, name).data for name in layer.lowbit_loaded}, layer.lowbit_part)
        weight = COMPRESSED_TENSORS.read("", lambda name: loaded[name.removeprefix(".")], self.scheme)
        tensors = self.packed(weight, layer.lowbit_part)
        for name in layer.lowbit_loaded:
            delattr(layer, name)
        for name, tensor in tensors.items():
            layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def whole(self, loaded: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
        """The tensors of the shard in the form of a file, from the loaded ones."""
        return loaded


class PackedWeights(LowbitScheme):
    """4- or 8-bit weights and 16-bit activations: `pack-quantized`."""

    def parameters(self, part: Part) -> dict[str, BasevLLMParameter]:
        """Packed words, scales and zeros, sharded as in vLLM's own scheme."""
        scheme, per_word, loader = self.scheme, 32 // self.scheme.bits, {"weight_loader": part.loader}
        words: dict[str, Any] = {"packed_factor": per_word, **loader}
        packed = torch.empty(part.n, -(-part.k // per_word), dtype=torch.int32)
        scales = torch.empty(part.n, scheme.groups(part.k), dtype=part.dtype)
        zeros = torch.zeros(-(-part.n // per_word), scheme.groups(part.k), dtype=torch.int32)
        found = {
            "weight_packed": PackedvLLMParameter(data=packed, input_dim=1, output_dim=0, packed_dim=1, **words),
            "weight_shape": BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), **loader),
        }
        if scheme.group_size == -1:  # every shard of the inputs needs the row's scale
            found["weight_scale"] = ChannelQuantScaleParameter(data=scales, output_dim=0, **loader)
            zero: Any = PackedColumnParameter(data=zeros, output_dim=0, packed_dim=0, **words)
        else:
            found["weight_scale"] = GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, **loader)
            zero = PackedvLLMParameter(data=zeros, input_dim=1, output_dim=0, packed_dim=0, **words)
        return found if scheme.symmetric else found | {"weight_zero_point": zero}

    def whole(self, loaded: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
        """With the shard's own shape: the file has the shape of the whole linear."""
        return loaded | {"weight_shape": torch.tensor([part.n, part.k])}

    def reason_against(self, part: Part) -> str | None:
        """The reason why the shard cannot be packed, or None."""
        return reason_against_packing(part.n, part.k, self.scheme.group_size, TILE_ROWS)

    def packed(self, weight: QTensor, part: Part) -> dict[str, Tensor | None]:
        """Words, scales and zeros in the kernels' layout."""
        packed = prepack(weight, part.dtype)
        return {"weight_packed": packed.words, "weight_scale": packed.scales, "weight_zero_point": packed.zeros}

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        part, scheme = layer.lowbit_part, self.scheme
        tensors = layer.weight_packed, layer.weight_scale, layer.weight_zero_point
        return Linear(Packed(*tensors, part.n, part.k, scheme.bits, scheme.group_size), bias, hints=DEPENDENT)(x)


class PlainWeights(LowbitScheme):
    """int8 weights and activations: `int-quantized`. With `one_scale`, each linear has a single scale for its
    weight."""

    def __init__(self, scheme: Scheme, one_scale: bool) -> None:
        super().__init__(scheme)
        self.one_scale = one_scale

    def parameters(self, part: Part) -> dict[str, BasevLLMParameter]:
        """Codes and scales, and a calibrated input scale for each linear.

        Scales are declared float32 whatever the file has: the default here would be the model's dtype, which would
        round a calibrated scale.
        """
        loader: dict[str, Any] = {"weight_loader": part.loader}
        codes = torch.empty(part.n, part.k, dtype=torch.int8)
        per_row, per_linear = (torch.zeros(size, dtype=torch.float32) for size in ((part.n, 1), len(part.widths)))
        found = {"weight": ModelWeightParameter(data=codes, input_dim=1, output_dim=0, **loader)}
        if self.one_scale:
            found["weight_scale"] = PerTensorScaleParameter(data=per_linear, **loader)
        else:
            found["weight_scale"] = ChannelQuantScaleParameter(data=per_row, output_dim=0, **loader)
        if self.scheme.static_inputs:
            found["input_scale"] = PerTensorScaleParameter(data=per_linear.clone(), **loader)
        return found

    def whole(self, loaded: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
        """With a scale for every row, and the largest input scale among fused linears.

        vLLM's own scheme keeps the scale loaded last, which is equal if fused linears were calibrated together.
        """
        found = dict(loaded)
        if self.one_scale:
            widths = torch.tensor(part.widths, device=loaded["weight_scale"].device)
            found["weight_scale"] = loaded["weight_scale"].repeat_interleave(widths).unsqueeze(1)
        if "input_scale" in loaded:
            found["input_scale"] = loaded["input_scale"].max()
        return found

    def reason_against(self, part: Part) -> str | None:
        """The reason why the shard cannot be multiplied in int8, or None."""
        return w8a8.reason_against_packing(part.n, part.k)

    def packed(self, weight: QTensor, part: Part) -> dict[str, Tensor | None]:
        """Codes and scales, and the calibrated input scale if there is one."""
        packed = w8a8.pack_int8(weight)
        return {"weight": packed.codes, "weight_scale": packed.scales, "input_scale": weight.input_scale}

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, with x rounded to int8 and multiplied in int8."""
        assert self.scheme.inputs is not None
        inputs = RoundedInputs(self.scheme.inputs, layer.input_scale)
        return Linear(Int8(layer.weight, layer.weight_scale), bias, inputs, DEPENDENT)(x)


def register() -> None:
    """Register the quantization `lowbit` with vLLM, which calls this in each of its processes."""
    register_quantization_config(NAME)(LowbitConfig)
