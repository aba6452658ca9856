"""transformers with lowbit's kernels: after `import lowbit.integrations.transformers`, quantized linears stay packed.

`AutoModelForCausalLM.from_pretrained(DIR)` then reads compressed-tensors, GPTQ and AWQ checkpoints with lowbit's
readers; neither compressed-tensors nor gptqmodel is needed. Unsupported checkpoints (floats, other widths) still go to
transformers' own quantizers. The import itself is the switch: it replaces entries in two tables of transformers.
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
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.fp8 import BLOCK_FP8
from lowbit.models.placement import place
from lowbit.quant.linear import QLinear
from lowbit.quant.qtensor import QTensor

HALVES = (torch.float16, torch.bfloat16)


class LowbitQuantizationConfig(QuantizationConfigMixin):
    """A quantization_config from config.json."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class AwaitingLinear(nn.Module):
    """Placeholder for a quantized linear. Keeps its bias while transformers loads the rest."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias


class LowbitQuantizer(HfQuantizer):
    """Replaces quantized linears by lowbit's, and fills them from the files."""

    requires_calibration = True

    def __init__(self, quantization_config: LowbitQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._awaited: dict[str, str] = {}  # module -> linear in the file

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str], device_map: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Insert placeholders. CheckpointError if a quantized tensor does not belong to a linear of the model."""
        self._tensors = LogicalTensors(open_checkpoint(Path(checkpoint_files[0]).parent))
        self._devices = dict(device_map or {})
        linears = list(self._tensors.schemes)
        for name, placement in place(model, [f"{linear}.weight" for linear in linears]).items():
            module_name = placement.parameter.removesuffix(".weight")
            module = model.get_submodule(module_name) if placement.expert is None else None
            if not isinstance(module, nn.Linear | Conv1D):
                raise CheckpointError(
                    f"{name}: {type(model).__name__} has it in no linear of its own (experts are fused)"
                )
            model.set_submodule(module_name, AwaitingLinear(module.bias))
            self._awaited[module_name] = name.removesuffix(".weight")
        if len(self._awaited) != len(linears):
            lost = sorted(set(linears) - set(self._awaited.values()))
            raise CheckpointError(f"{lost[0]}: quantized in the files, and {type(model).__name__} has no such linear")
        assert self._tensors.format is not None
        names = {f"{linear}.{suffix}" for linear in linears for suffix in self._tensors.format.suffixes}
        ours = {rf"^{re.escape(name)}$" for name in names}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ours

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
        return model

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
