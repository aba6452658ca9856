"""One linear of a W8A8 checkpoint inside vLLM, on vLLM's own kernel and on ours, for the same inputs.

    PYTHON vllm_layer.py TENSORS CONFIG --out FILE

PYTHON is vLLM's, lowbit there to import. TENSORS is a safetensors file with `q`, `k` and `v` (.weight, .weight_scale
and, where inputs have one calibrated scale, .input_scale), which vLLM runs as one, and the inputs `x` (m, k), of whose
dtype the layer is. CONFIG is the quantization_config in JSON. FILE gets `theirs` and `ours`, what each gives for x, and
the `input_scale` and `weight_scale` that ours keeps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.utils.network_utils import get_distributed_init_method, get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype

from lowbit.integrations.vllm import LowbitConfig

HEAD = 32  # outputs of a head


def main() -> None:
    parser = argparse.ArgumentParser(description="a linear of a W8A8 checkpoint inside vLLM")
    parser.add_argument("tensors", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tensors, block = load_file(args.tensors), json.loads(args.config.read_text())
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, get_distributed_init_method("127.0.0.1", get_open_port()), 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        theirs = layer_of(CompressedTensorsConfig.from_config(block), tensors)
        ours = layer_of(LowbitConfig.from_config(block), tensors)
        found = {"theirs": theirs(tensors["x"])[0], "ours": ours(tensors["x"])[0], "weight_scale": ours.weight_scale}
    if ours.input_scale is not None:
        found["input_scale"] = ours.input_scale
    save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, args.out)


def layer_of(config: Any, tensors: dict[str, torch.Tensor]) -> QKVParallelLinear:
    """q, k and v as vLLM builds and loads them: torch's default dtype is the model's meanwhile."""
    x, heads = tensors["x"], {name: tensors[f"{name}.weight"].shape[0] // HEAD for name in "qkv"}
    with set_default_torch_dtype(x.dtype):
        layer = QKVParallelLinear(
            x.shape[1], HEAD, heads["q"], heads["k"], bias=False, quant_config=config, prefix="model.layers.0.qkv_proj"
        )
        for name in "qkv":
            for suffix in ("weight", "weight_scale", "input_scale"):
                if f"{name}.{suffix}" in tensors:
                    parameter = getattr(layer, suffix)
                    parameter.weight_loader(parameter, tensors[f"{name}.{suffix}"], name)
        layer.quant_method.process_weights_after_loading(layer)
    return layer


if __name__ == "__main__":
    main()
