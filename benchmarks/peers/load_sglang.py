"""Check of SGLang's loading of a Llama checkpoint, without a GPU: each linear's scheme, and its tensors.

    PYTHON load_sglang.py CHECKPOINT --out FILE

PYTHON has SGLang (0.5.23 was tried) and its imports. Missing packages are replaced by empty ones, and the GPU whose
capability it queries is reported as an H100. SGLang's own model is built on the CPU and loads the checkpoint's tensors;
its kernels, the next step, need a GPU. FILE is a JSON object:

    schemes  linear (q, k and v as one; gate and up as one) -> class of SGLang's scheme or method
    wrong    parameters of linears that are not, side by side, the file's tensors of what they stand for
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in the place of packages that are not installed."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __name__=spec.name, __spec__=spec, __path__=[], __file__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="a checkpoint in SGLang, as far as a CPU goes")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    models = import_models()
    model, tensors = load(models, args.checkpoint), load_file(args.checkpoint / "model.safetensors")
    model.load_weights(list(tensors.items()))
    args.out.write_text(json.dumps({"schemes": schemes_of(model), "wrong": wrong_parameters(model, tensors)}))


def import_models() -> ModuleType:
    """SGLang's module for Llama."""
    missing = Missing()
    sys.meta_path.insert(0, missing)
    while True:
        try:
            return importlib.import_module("sglang.srt.models.llama")
        except ModuleNotFoundError as error:
            package = (error.name or "sglang").partition(".")[0]
            if package == "sglang" or package in missing.packages:
                raise
            missing.packages.add(package)
            for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
                del sys.modules[name]


def load(models: ModuleType, checkpoint: Path) -> Any:
    """SGLang's model for the checkpoint, one process, its parameters not yet loaded."""
    from sglang.srt import distributed, runtime_context
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.awq import AWQMarlinConfig
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
    from transformers import AutoConfig

    marlin_utils.get_device_capability = torch.cuda.get_device_capability  # its own finds no GPU to ask
    scratch, config = Path(tempfile.mkdtemp()), json.loads((checkpoint / "config.json").read_text())
    block = config.pop("quantization_config")  # on a CPU the server would refuse what it takes on a GPU
    (scratch / "config.json").write_text(json.dumps(config))
    set_global_server_args_for_scheduler(ServerArgs(model_path=str(scratch), device="cpu"))
    meeting = f"file://{scratch}/meeting"
    distributed.init_distributed_environment(1, 0, meeting, 0, "gloo")
    distributed.initialize_model_parallel()
    ranks = {name: 0 for name in runtime_context._parallel_fields() if name.endswith("_rank")}
    sizes = {name: 1 for name in runtime_context._parallel_fields() if name.endswith("_size")}
    runtime_context.get_parallel().override_permanently(**ranks, **sizes)
    configs = {"compressed-tensors": CompressedTensorsConfig, "gptq": GPTQMarlinConfig, "awq": AWQMarlinConfig}
    quantization = configs[block["quant_method"]].from_config(block)
    quantization.packed_modules_mapping = FUSED
    torch.set_default_dtype(torch.bfloat16)
    return models.LlamaForCausalLM(AutoConfig.from_pretrained(scratch), quant_config=quantization)


def schemes_of(model: Any) -> dict[str, str]:
    """The classes with which SGLang multiplies each linear of the blocks."""
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    return {
        name: type(getattr(module, "scheme", None) or module.quant_method).__name__ for name, module in linears.items()
    }


def wrong_parameters(model: Any, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Parameters that are not the file's tensors side by side, in either dimension."""
    wrong = []
    for name, parameter in model.named_parameters():
        owner, _, suffix = name.rpartition(".")
        parent, _, leaf = owner.rpartition(".")
        if not leaf.endswith("_proj") or suffix == "weight_shape":  # a shape is that of the last part, and unused
            continue
        parts = [tensors.get(f"{parent}.{part}.{suffix}") for part in FUSED.get(leaf, [leaf])]
        if any(part is None for part in parts) or not any(same(parameter.data, parts, dim) for dim in (0, 1)):
            wrong.append(name)
    return wrong


def same(parameter: torch.Tensor, parts: list[torch.Tensor], dim: int) -> bool:
    """True if the parameter is `parts`, in its own type, along `dim`."""
    if dim >= parts[0].dim() or any(part.select(dim, 0).shape != parts[0].select(dim, 0).shape for part in parts):
        return False
    together = torch.cat(parts, dim) if parameter.shape != parts[0].shape else parts[0]
    return parameter.shape == together.shape and torch.equal(parameter, together.to(parameter.dtype))


if __name__ == "__main__":
    main()
