"""Engines over tiny models, for tests: quantized checkpoints of any format, and references that compute the same."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lowbit import engine
from lowbit.engine.drafts.gauge import Costs
from lowbit.engine.engine import Engine
from lowbit.export.dialects import FORMATS
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme
from tests.builders import make_model, save
from tests.quantized import write_config

# A row more is never dear, whatever the machine that runs a test is busy with.
CHEAP_ROWS = Costs({(sequences, 1): 1.0 for sequences in range(1, 5)}, fixed=True)


def tiny(directory: Path, family: str = "llama", **changes) -> tuple[Engine, PreTrainedModel]:
    """An engine in float32 on the CPU, and transformers' model of the same weights."""
    model = make_model(family, **changes)
    save(model, directory)
    loaded = engine.load(directory, device="cpu", context=128)
    loaded.spaces.costs = CHEAP_ROWS
    return loaded, model


def quantized(
    directory: Path, scheme: Scheme | Callable[[str], Scheme], fmt: str = "compressed-tensors", family: str = "llama"
) -> PreTrainedModel:
    """Writes a checkpoint whose blocks' linears have `scheme`; returns transformers' model of what they stand for.

    scheme  of all linears, or of each by its name
    """
    model = make_model(family)
    save(model, directory)
    tensors, schemes = {}, {}
    for name, value in load_file(directory / "model.safetensors").items():
        linear = name.removesuffix(".weight")
        if value.ndim != 2 or ".layers." not in name:
            tensors[name] = value
            continue
        weight = rounded(value, scheme(linear) if callable(scheme) else scheme)
        tensors |= FORMATS[fmt].write(linear, weight)
        schemes[linear] = weight.scheme
        model.get_parameter(name).data.copy_(weight.dequantize())
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    block = FORMATS[fmt].quantization_config(schemes, [])
    write_config(directory, config, FORMATS[fmt], block)
    return model


def rounded(weight: torch.Tensor, scheme: Scheme) -> QTensor:
    """`weight` to the nearest codes, scales in float16; inputs that share a scale get one that fits a normed input."""
    plain = round_to_nearest(weight, scheme.weights_only, torch.float16)
    scale = torch.tensor(0.05) if scheme.static_inputs else None
    return QTensor(plain.codes, plain.scales, plain.zeros, scheme, scale, plain.divisor)
