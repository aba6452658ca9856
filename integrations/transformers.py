"""transformers with lowbit's kernels: after `import lowbit.integrations.transformers`, quantized linears stay packed.

`AutoModelForCausalLM.from_pretrained(DIR)` then reads every format with lowbit's readers; neither compressed-tensors
nor gptqmodel is needed. Linears, heads and experts stay packed where a kernel multiplies with them. Embeddings, and
experts without a kernel, are expanded to 16 bits. Unsupported checkpoints still go to transformers' own quantizers. The
import itself is the switch: it replaces entries in two tables of transformers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.fp8 import BLOCK_FP8
from lowbit.models.placement import Placement, place, tensor_of
from lowbit.quant.kernels.joined import shared_inputs, stacked
from lowbit.quant.kernels.pairs import Chosen
from lowbit.quant.kernels.stack import Experts, StackedLinear, load_stack
from lowbit.quant.kernels.wna16_experts import Gate
from lowbit.quant.linear import QLinear
from lowbit.quant.qtensor import QTensor

LOGGER = logging.get_logger("transformers.lowbit")
HALVES = (torch.float16, torch.bfloat16)
UP, DOWN = "gate_up_proj", "down_proj"  # stacks of experts in transformers' modules
GATES = {"SiLUActivation": "silu_mul", "SiLU": "silu_mul", "GELUTanh": "gelu_tanh_mul"}  # by classes of activations


class LowbitQuantizationConfig(QuantizationConfigMixin):
    """A quantization_config from config.json."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class AwaitingLinear(nn.Module):
    """Placeholder for a quantized linear. Keeps its bias while transformers loads the rest."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias


class AwaitingExperts(nn.Module):
    """Placeholder for the quantized experts of a layer.

    names  the linears of the file in the model's stacks `gate_up_proj` and `down_proj`, expert after expert
    """

    def __init__(self, gate: Gate, count: int) -> None:
        super().__init__()
        self.gate, self.count = gate, count
        self.names: dict[str, dict[tuple[int, int], str]] = {UP: {}, DOWN: {}}


class QExperts(nn.Module):
    """The experts of a layer on lowbit's kernels, in the place of transformers' module."""

    def __init__(self, experts: Experts, count: int) -> None:
        super().__init__()
        self.experts, self.count = experts, count

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum (m, hidden) over each row's experts of hidden_states (m, hidden)."""
        chosen = Chosen(top_k_index.int().contiguous(), top_k_weights.float().contiguous(), self.count)
        return self.experts(hidden_states, chosen)


class LowbitQuantizer(HfQuantizer):
    """Replaces quantized linears and experts by lowbit's, and fills them from the files."""

    requires_calibration = True

    def __init__(self, quantization_config: LowbitQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._awaited: dict[str, str] = {}  # module -> linear in the file
        self._expanded: dict[str, Placement] = {}  # linear in the file -> its place in a parameter of 16 bits

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str], device_map: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Insert placeholders. CheckpointError if a quantized tensor has no place in the model."""
        self._tensors = LogicalTensors(open_checkpoint(Path(checkpoint_files[0]).parent))
        self._devices = dict(device_map or {})
        linears = list(self._tensors.schemes)
        placements = place(model, [f"{linear}.weight" for linear in linears])
        if len(placements) != len(linears):
            lost = sorted(set(linears) - {name.removesuffix(".weight") for name in placements})
            raise CheckpointError(f"{lost[0]}: quantized in the files, and {type(model).__name__} has no such linear")
        for name, placement in placements.items():
            self._await(model, name.removesuffix(".weight"), placement)
        assert self._tensors.format is not None
        names = {f"{linear}.{suffix}" for linear in linears for suffix in self._tensors.format.suffixes}
        ours = {rf"^{re.escape(name)}$" for name in names}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ours
        filled = {rf"^{re.escape(placement.parameter)}$" for placement in self._expanded.values()}
        model._keys_to_ignore_on_load_missing = set(model._keys_to_ignore_on_load_missing or ()) | filled

    def _await(self, model: Any, linear: str, placement: Placement) -> None:
        """Note where a linear of the file goes, with a placeholder there. CheckpointError if it has no place."""
        owner, _, leaf = placement.parameter.rpartition(".")
        module = model.get_submodule(owner)
        if placement.expert is not None:
            if not isinstance(module, AwaitingExperts) and (gate := gate_of(module)) is not None:
                model.set_submodule(owner, module := AwaitingExperts(gate, module.num_experts))
            if isinstance(module, AwaitingExperts):
                module.names[leaf][placement.expert, placement.part] = linear
                return
        elif isinstance(module, nn.Linear | Conv1D):
            model.set_submodule(owner, AwaitingLinear(module.bias))
            self._awaited[owner] = linear
            return
        elif not isinstance(module, nn.Embedding):
            raise CheckpointError(
                f"{linear}: {type(model).__name__} has it in {type(module).__name__}, not in a linear"
            )
        self._expanded[linear] = placement

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Read, pack and insert the quantized weights. CheckpointError for a dtype that the kernels do not support."""
        if model.dtype not in HALVES:
            raise CheckpointError(
                f"the model is in {model.dtype}: lowbit computes in 16 bits; pass dtype=torch.bfloat16"
            )
        for module_name, linear in self._awaited.items():
            bias = model.get_submodule(module_name).bias
            weight = self._tensors.qtensor(linear).to(self._device(module_name))
            model.set_submodule(module_name, linear_for(weight, bias, model.dtype))
        if self._expanded:
            first = next(iter(self._expanded))
            LOGGER.warning("lowbit: %s and %d more are expanded to 16 bits", first, len(self._expanded) - 1)
        for linear, placement in self._expanded.items():
            parameter = tensor_of(model, placement)
            placement.view(parameter.data).copy_(self._tensors.qtensor(linear).dequantize(model.dtype))
        waiting = {name: module for name, module in model.named_modules() if isinstance(module, AwaitingExperts)}
        for name, awaiting in waiting.items():
            model.set_submodule(name, self._experts(awaiting, self._device(name), model.dtype))
        return model

    def _experts(self, awaiting: AwaitingExperts, device: Any, dtype: torch.dtype) -> QExperts:
        """The packed experts of a layer."""

        def stack(leaf: str) -> StackedLinear:
            found = awaiting.names[leaf]
            matrices = [self._tensors.qtensor(found[place]).to(device) for place in sorted(found)]
            weight = load_stack(stacked(list(matrices), dtype), awaiting.count, dtype, paired=leaf == UP)
            return StackedLinear(weight, None, shared_inputs(list(matrices)))

        return QExperts(Experts(stack(UP), stack(DOWN), awaiting.gate), awaiting.count)

    def _device(self, module_name: str) -> Any:
        """The device of a module: the longest matching prefix in the device map."""
        parts = module_name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
        return next((self._devices[prefix] for prefix in prefixes if prefix in self._devices), "cpu")

    def is_serializable(self) -> bool:
        """False: the checkpoint on disk is the serialized form."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradient."""
        return False


def gate_of(module: nn.Module) -> Gate | None:
    """The activation of transformers' experts if our kernels have it, and their layout; None if not."""
    stacks = {name for name, _ in module.named_parameters(recurse=False)}
    name = GATES.get(type(getattr(module, "act_fn", None)).__name__)
    gating = getattr(type(module), "_apply_gate", None)
    plain = getattr(gating, "__name__", "") == "_default_apply_gate" and not module.has_post_expert_norm
    in_halves = getattr(module, "is_concatenated", False) and not module.is_transposed
    return Gate(name) if name and stacks == {UP, DOWN} and plain and in_halves else None


def linear_for(weight: QTensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The module that multiplies with `weight`. CheckpointError if no kernel supports it."""
    try:
        return QLinear.from_qtensor(weight, bias, dtype)
    except ValueError as error:
        raise CheckpointError(f"a {weight.scheme} weight {tuple(weight.shape)}: {error}") from error


class _Configs:
    """An entry in transformers' table of configurations: lowbit's for known dialects, otherwise the original one."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def from_dict(self, values: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration object for a quantization_config."""
        if is_read_here(values):
            return LowbitQuantizationConfig(**values)
        return self.theirs.from_dict(values, **kwargs)


class _Quantizers:
    """An entry in transformers' table of quantizers: lowbit's for its own configurations, otherwise the original
    one."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, config: Any, **kwargs: Any) -> Any:
        ours = isinstance(config, LowbitQuantizationConfig)
        return LowbitQuantizer(config, **kwargs) if ours else self.theirs(config, **kwargs)


def is_read_here(values: Mapping[str, Any]) -> bool:
    """True if lowbit's readers support a quantization_config."""
    for fmt in FORMATS.values():
        if fmt.recognizes(values):
            try:
                fmt.schemes_of(values, [])
            except CheckpointError:
                return False
            return True
    return False


# transformers has kernels for block FP8, where ours would expand it to 16 bits
for _method in ({fmt.method for fmt in FORMATS.values()} & AUTO_QUANTIZER_MAPPING.keys()) - {BLOCK_FP8.method}:
    if not isinstance(AUTO_QUANTIZER_MAPPING[_method], _Quantizers):
        AUTO_QUANTIZATION_CONFIG_MAPPING[_method] = _Configs(AUTO_QUANTIZATION_CONFIG_MAPPING[_method])
        AUTO_QUANTIZER_MAPPING[_method] = _Quantizers(AUTO_QUANTIZER_MAPPING[_method])
