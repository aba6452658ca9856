"""The layout `fp8` of DeepSeek's and Qwen's own checkpoints: block FP8, read by vLLM, SGLang and transformers.

For a linear P with weight (n, k):

    P.weight            float8_e4m3fn  (n, k)
    P.weight_scale_inv  float32        (ceil(n / 128), ceil(k / 128))   w = code * scale, in spite of the name

Inputs are rounded in groups of 128, each by a scale of its own. Blocks at the end of a weight may be cut off in files
that are read; none is written.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lowbit.export.format import Format, ShapeReader, TensorReader, following, reading
from lowbit.export.microscaling import weight_of
from lowbit.quant.numbers import FP8
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import PerBlock, PerGroup, Scheme, Side, parse_scheme

NAME = "fp8"
BLOCK = parse_scheme("fp8-block")
SUFFIXES = ("weight", "weight_scale_inv")


class BlockFp8(Format):
    """The format `fp8`."""

    name = NAME
    method = NAME
    package = "accelerate"
    suffixes = SUFFIXES
    marker = "weight_scale_inv"
    loading = (
        "The files follow the layout of DeepSeek's and Qwen's FP8 checkpoints: vLLM, SGLang and transformers load the "
        "directory as it is."
    )
    uniform = True
    by_rows = True
    scale_dtype = torch.float32

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why the layout cannot hold a scheme, or None."""
        return None if scheme == BLOCK else f"fp8 files hold {BLOCK} and nothing else"

    def write(self, name: str, weight: QTensor) -> dict[str, torch.Tensor]:
        """The file's tensors for the linear `name`."""
        return {f"{name}.weight": weight.codes, f"{name}.weight_scale_inv": weight.scales}

    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`. CheckpointError if its tensors contradict each other."""
        with reading(name):
            return weight_of(tensor(f"{name}.weight"), tensor(f"{name}.weight_scale_inv"), scheme)

    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`."""
        n, k = shapes(f"{name}.weight")
        return n, k

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json."""
        return {
            "quant_method": NAME,
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": sorted(unquantized),
        }

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each linear. CheckpointError if the block asks for anything that is not supported here."""
        with following():
            (rows, columns), activations = config["weight_block_size"], config.get("activation_scheme", "dynamic")
            if activations != "dynamic":
                raise ValueError(f"inputs with activation_scheme {activations!r} are not supported with blocks")
            scheme = Scheme(Side(FP8, PerBlock(rows, columns)), Side(FP8, PerGroup(columns)))
        return dict.fromkeys(names, scheme)


BLOCK_FP8 = BlockFp8()
