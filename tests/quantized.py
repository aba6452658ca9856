"""Quantized checkpoints of tiny models in any format, and the dense model that each stands for."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.convert import express
from lowbit.export.dialects import FORMATS
from lowbit.export.format import Format
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.numerics import input_rounding
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import make_scheme, parse_scheme


def quantize_files(directory: Path, fmt: str, text: str, left: tuple[str, ...] = ("lm_head",)) -> None:
    """Rewrite a saved model: every linear of its blocks rounded to the scheme `text` in the format `fmt`.

    In AWQ a symmetric weight has zeros in the middle.
    """
    scheme = parse_scheme(text)
    stored = make_scheme(scheme.bits, scheme.group_size, False) if fmt == "awq" else scheme
    tensors = load_file(directory / "model.safetensors")
    names = [
        key.removesuffix(".weight")
        for key in tensors
        if "proj.weight" in key and key.removesuffix(".weight") not in left
    ]
    for name in names:
        w = tensors.pop(f"{name}.weight").float()
        plain = round_to_nearest(w, scheme.weights_only, FORMATS[fmt].scale_dtype or torch.bfloat16)
        zeros = None if plain.zeros is None else plain.zeros.clamp(min=1)
        parent = scheme.inputs is not None and scheme.inputs.parent
        input_scale = torch.tensor(512.0 if parent else 0.01) if scheme.static_inputs else None
        weight, _ = express(QTensor(plain.codes, plain.scales, zeros, scheme, input_scale, plain.divisor), stored)
        tensors |= FORMATS[fmt].write(name, weight)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    block = FORMATS[fmt].quantization_config(dict.fromkeys(names, stored), left)
    write_config(directory, json.loads((directory / "config.json").read_text()), FORMATS[fmt], block)


def write_config(directory: Path, config: Mapping[str, Any], fmt: Format, block: Mapping[str, Any]) -> None:
    """Write config.json and the format's sidecar, for files that a test wrote itself."""
    for name in filter(None, ("config.json", fmt.sidecar)):
        value = block if name == fmt.sidecar else dict(config) | {"quantization_config": block}
        (directory / name).write_text(json.dumps(value))


def dense(directory: Path, inputs: bool = True) -> PreTrainedModel:
    """The same model in float32, weights dequantized by our reader; inputs rounded before each product as they are, or
    not at all without `inputs`."""
    logical = LogicalTensors(open_checkpoint(directory))
    model = AutoModelForCausalLM.from_config(open_source(str(directory)).config, dtype=torch.float32)
    model.load_state_dict({name: logical.read(name).float() for name in logical.names}, strict=False)
    for name, scheme in logical.schemes.items():
        if inputs and scheme.inputs is not None:
            rounding = input_rounding(scheme.inputs, logical.qtensor(name).input_scale)
            model.get_submodule(name).register_forward_pre_hook(partial(rounded, rounding))
    return model.eval()


def rounded(
    rounding: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, args: tuple[torch.Tensor]
) -> torch.Tensor:
    return rounding(args[0])
