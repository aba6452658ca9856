"""vLLM's quantization method `lowbit`: compressed-tensors checkpoints with lowbit's kernels.

    vllm serve DIR --quantization lowbit

vLLM finds `register` through the entry point `vllm.general_plugins`. Its own CompressedTensorsConfig says which linears
a checkpoint quantizes. Storage and multiplication of the weights of linears, heads, embeddings and experts are
replaced; tensor parallelism, batching, caching, LoRA and speculative decoding stay vLLM's.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from lowbit.errors import CheckpointError
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.integrations.arriving import Arriving, Joined, Share, placeholder
from lowbit.integrations.vllm_experts import LowbitExperts, reason_against_experts
from lowbit.quant.kernels.extension import reason_against_device
from lowbit.quant.kernels.traced import form_of, multiply
from lowbit.quant.kernels.weight import Dense, Hints, Linear, Weight, load_weight
from lowbit.quant.scheme import Scheme

NAME = "lowbit"
DEPENDENT = Hints(dependent=True)
EMBEDDING = "model.embed_tokens"  # for model classes that give their embedding no name
# The fields of a packed weight by the parameters that hold them: vLLM's LoRA looks for the first two.
PARAMETERS = {
    "words": "weight_packed",
    "matrix": "weight",
    "codes": "weight",
    "scales": "weight_scale",
    "zeros": "weight_zero_point",
    "factors": "weight_factors",
}
SHARDS = {"q": 0, "k": 1, "v": 2}
LOGGER = logging.getLogger("vllm.lowbit")  # below vLLM's, whose level and handlers it has


class LowbitConfig(CompressedTensorsConfig):
    """compressed-tensors' configuration, with weights multiplied by lowbit's kernels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._said: set[str] = set()
        self._last: Any = None

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
        """`lowbit` if the user asks for it, otherwise None. ValueError for a checkpoint in another format."""
        found = hf_quant_cfg.get("quant_method")
        if user_quant == NAME and found != COMPRESSED_TENSORS.method:
            raise ValueError(
                f"--quantization {NAME} takes compressed-tensors, the checkpoint is in {found!r}: write it anew with "
                "`lowbit convert DIR OUT --format compressed-tensors`"
            )
        return NAME if user_quant == NAME else None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method for a quantized layer, vLLM's for any other. CheckpointError for a scheme that no reader knows."""
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return super().get_quant_method(layer, prefix)
        if self.transform_config is not None:
            raise CheckpointError(f"{prefix}: the checkpoint transforms inputs at run time, which lowbit does not")
        is_linear = isinstance(layer, LinearBase | ParallelLMHead)
        names = self._names_of(prefix if is_linear else prefix or EMBEDDING)
        schemes = [self.scheme_of(layer, name) for name in names]
        if not any(schemes):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return (LowbitLinear if is_linear else LowbitEmbedding)(names, schemes, self)

    def scheme_of(self, layer: Any, name: str) -> Scheme | None:
        """The scheme of the linear `name`, or None. CheckpointError for an unknown one."""
        found = self.get_scheme_dict(layer, name)
        if found is None or found.get("weights") is None:
            return None
        group = {key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in found.items()}
        config = {"config_groups": {name: group | {"targets": [name]}}}
        return COMPRESSED_TENSORS.schemes_of(config, [name])[name]

    def say(self, text: str) -> None:
        """Log what the user should know, once."""
        if text not in self._said:
            self._said.add(text)
            LOGGER.warning("lowbit: %s", text)

    def append(self, layer: Any) -> None:
        """Add a product to those of the model: vLLM packs them in the order in which it calls them, nearly always, and
        each prefetches the weight of the next. No result depends on that."""
        layer.lowbit_following = []  # a list, since a module would become a part of this one
        if self._last is not None:
            self._last.lowbit_following.append(layer)
        self._last = layer

    def _names_of(self, prefix: str) -> list[str]:
        """The linears of the checkpoint that vLLM runs as the module `prefix`."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _experts_method(self, layer: Any, prefix: str) -> Any:
        """Our method for experts, or vLLM's, with the reason said."""
        roles = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        names = [f"{prefix}.0.{role}" for role in roles]
        one = nn.Linear(1, 1, device="meta")  # an expert is a linear in the file, which a target may name by its class
        schemes = [self.scheme_of(one, name) for name in names]
        if not any(schemes):
            return super().get_quant_method(layer, prefix)
        reason = reason_against_experts(layer, schemes)
        if reason is None and schemes[0] is not None:
            return LowbitExperts(layer.moe_config, prefix, roles, schemes[0])
        self.say(f"experts stay vLLM's own: {reason}")
        return super().get_quant_method(layer, prefix)


class LowbitLinear(LinearMethodBase):
    """A quantized linear with lowbit's kernels: load, join, pack, multiply.

    names, schemes  linears of the checkpoint that vLLM runs as one, and the scheme of each
    config          of the model
    """

    def __init__(self, names: list[str], schemes: list[Scheme | None], config: LowbitConfig) -> None:
        self.names, self.schemes, self.config = names, schemes, config

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        """Register a parameter for each tensor of the checkpoint, empty until all tensors are there.

        CheckpointError if a scheme does not fit the inputs.
        """
        self.arriving = Arriving(self.names, self.schemes, input_size)
        self.suffixes, self.dtype = self.arriving.suffixes, params_dtype
        self.share = share_of(layer, output_partition_sizes, input_size_per_partition)
        self.linear: Linear | None = None
        for suffix in self.suffixes:
            layer.register_parameter(suffix, placeholder(partial(self._load, suffix)))
        device = getattr(layer, self.suffixes[0]).device
        reason = reason_against_device(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
        if reason is not None:
            self.config.say(f"plain torch multiplies: {reason}")

    def _load(self, suffix: str, parameter: Tensor, tensor: Tensor, shard: str | int | None = None) -> None:
        """Take a tensor of the linear `shard`, and pack the weight once all are there."""
        if isinstance(shard, tuple):
            raise CheckpointError(f"{self.names[0]}: the file has the linears {shard} of this product in one tensor")
        part = SHARDS[shard] if isinstance(shard, str) else shard
        self.arriving.put(suffix, tensor, part)
        if not self.arriving.missing:
            self.linear = self._packed(parameter.device)

    def _packed(self, device: torch.device) -> Linear:
        """The share in the kernels' layout."""
        joined = self.arriving.joined(self.share, self.dtype, device)
        return Linear(self._weight(joined), None, joined.inputs, DEPENDENT)

    def _weight(self, joined: Joined) -> Weight:
        """The weight in the kernels' layout; expanded to 16 bits, which is said, if no kernel multiplies with it."""
        weight = load_weight(joined.weight, self.dtype)
        if isinstance(weight, Dense):
            self.config.say(f"{self.arriving.name} and others like it are expanded to 16 bits: {joined.reason}")
        return weight

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the packed weight in the place of the loaded tensors. CheckpointError if some of them never came."""
        if self.linear is None:
            self.linear = self._packed(getattr(layer, self.suffixes[0]).device)
        linear, self.linear = self.linear, None
        for suffix in self.suffixes:
            delattr(layer, suffix)
        layer.lowbit_form, tensors = form_of(linear)
        layer.lowbit_parameters = [PARAMETERS[name] for name in tensors]
        held = {PARAMETERS[name]: tensor for name, tensor in tensors.items()}
        held["input_scale"] = None if linear.inputs is None else linear.inputs.scale
        for name, tensor in held.items():
            layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.config.append(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        tensors = [getattr(layer, name) for name in layer.lowbit_parameters]
        after = layer.lowbit_following[0] if layer.lowbit_following else None
        following = None if after is None else getattr(after, after.lowbit_parameters[0])
        return multiply(x, tensors, bias, layer.input_scale, following, layer.lowbit_form)


class LowbitEmbedding(LowbitLinear):
    """A quantized table of embeddings: expanded to 16 bits, since a step looks up a few of its rows."""

    def _weight(self, joined: Joined) -> Weight:
        weight = joined.weight
        return Dense(weight if isinstance(weight, Tensor) else weight.dequantize().to(self.dtype))

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """The rows of `ids`."""
        return functional.embedding(ids, layer.weight)


def share_of(layer: Any, widths: list[int], k: int) -> Share:
    """The share of a layer that this process holds."""
    indices = getattr(layer, "shard_indices", None)
    first = None if indices is None else indices.org_vocab_start_index
    return Share(tuple(widths), k, getattr(layer, "tp_rank", 0), layer.tp_size, first)


def register() -> None:
    """Register the quantization `lowbit` with vLLM, which calls this in each of its processes."""
    register_quantization_config(NAME)(LowbitConfig)
