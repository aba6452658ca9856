"""The layout `modelopt` of NVIDIA's checkpoints: NVFP4, and FP8 that is read alone, for vLLM, SGLang and TensorRT-LLM.

For a linear P with weight (n, k):

    P.weight          uint8          (n, k / 2)    fp4: element 2 j in the low half of byte j
    P.weight_scale    float8_e4m3fn  (n, k / 16)
    P.weight_scale_2  float32        ()            a factor, w = code * scale * scale_2: the reciprocal of our divisor
    P.input_scale     float32        ()            the same of the inputs' scales, only with quantized inputs

FP8: P.weight float8_e4m3fn (n, k), P.weight_scale () and P.input_scale () float32, both factors.

Our own divisors are powers of two, so that factors are exact. The quantization block is in config.json and in
hf_quant_config.json; readers look for its keys at its top or under `quantization`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.errors import CheckpointError
from lowbit.export.cache import PER_TENSOR, cache_names
from lowbit.export.engines.engine import Engine
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.format import Format, ShapeReader, TensorReader, following, reading
from lowbit.export.microscaling import every_row, one_number, stored_codes, stored_scales, weight_of
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import NVFP4, Scheme, parse_scheme

NAME = "modelopt"
# quant_algo -> scheme; the first two are written
ALGORITHMS = {"NVFP4": Scheme(NVFP4, NVFP4), "W4A16_NVFP4": Scheme(NVFP4), "FP8": parse_scheme("fp8-static")}
WRITTEN = tuple(ALGORITHMS.values())[:2]
MIXED = "MIXED_PRECISION"  # each layer has its own algorithm
CACHE = "FP8"
FACTOR, INPUTS = "weight_scale_2", "input_scale"
SUFFIXES = ("weight", "weight_scale", FACTOR, INPUTS)


class ModelOpt(Format):
    """The format `modelopt`."""

    name = NAME
    method = NAME
    package = "modelopt"
    suffixes = SUFFIXES
    marker = "weight_scale"
    loading = "The files follow the layout of NVIDIA's ModelOpt: vLLM, SGLang and TensorRT-LLM load the directory."
    uniform = True
    by_rows = True
    caches = (PER_TENSOR,)
    sidecar = "hf_quant_config.json"

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why the layout cannot hold a scheme, or None."""
        return None if scheme in WRITTEN else f"modelopt files hold {' and '.join(map(str, WRITTEN))} and nothing else"

    def reason_in(self, engine: Engine, scheme: Scheme) -> str | None:
        """The reason why an engine cannot load the files, or None."""
        return "it does not know modelopt" if engine is TRANSFORMERS else None

    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`."""
        assert weight.divisor is not None
        tensors = {
            f"{name}.weight": stored_codes(weight),
            f"{name}.weight_scale": stored_scales(weight),
            f"{name}.{FACTOR}": _factor(name, weight.divisor),
        }
        if weight.input_scale is not None:
            tensors[f"{name}.{INPUTS}"] = _factor(name, weight.input_scale)
        return tensors

    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`. CheckpointError if its tensors contradict each other."""

        def one(suffix: str) -> Tensor:
            return one_number(tensor(f"{name}.{suffix}"), suffix)

        with reading(name):
            codes, scales = tensor(f"{name}.weight"), tensor(f"{name}.weight_scale")
            inputs = one(INPUTS) if scheme.static_inputs else None
            if not scheme.weights.parent:
                return weight_of(codes, every_row(codes, scales), scheme, inputs)
            inputs = None if inputs is None else inputs.reciprocal()
            return weight_of(codes, scales, scheme, inputs, one(FACTOR).reciprocal())

    def divisor(self, name: str, tensor: TensorReader) -> float | None:
        """The reciprocal of the global scale."""
        return float(one_number(tensor(f"{name}.{FACTOR}"), FACTOR))

    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`."""
        n, packed = shapes(f"{name}.weight")
        return n, packed * (2 if scheme.weights.parent else 1)

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json."""
        (scheme,) = set(schemes.values())
        block = {
            "quant_algo": next(name for name, known in ALGORITHMS.items() if known == scheme),
            "kv_cache_quant_algo": None,
            "group_size": scheme.group_size,
            "exclude_modules": sorted(unquantized),
        }
        producer = {"name": "lowbit", "version": __version__}
        return {"quant_method": NAME, "producer": producer, **block, "quantization": block}

    def cached(self, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scales of keys and values by the names of the linears that make them."""
        return {
            f"{attention}.{part}_proj.{part}_scale": scales[name].reshape(())
            for attention, parts in cache_names(scales).items()
            for part, name in parts.items()
            if part != "q"
        }

    def with_cache(self, config: Mapping[str, Any], cache: str) -> dict[str, Any]:
        """A quantization_config with a key-value cache declared."""
        declared = {"kv_cache_quant_algo": CACHE}
        return dict(config) | declared | {"quantization": config["quantization"] | declared}

    def cache_of(self, config: Mapping[str, Any]) -> str | None:
        """The key-value cache that a quantization_config declares, or None. CheckpointError for another number."""
        with following(f"; of key-value caches {CACHE} is supported"):
            declared = config.get("quantization", config).get("kv_cache_quant_algo")
            if declared not in (None, CACHE):
                raise ValueError(f"kv_cache_quant_algo {declared!r}")
            return None if declared is None else PER_TENSOR

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each linear. CheckpointError if the block asks for anything that is not supported here."""
        with following(f"; of modelopt's algorithms {', '.join(ALGORITHMS)} are supported"):
            block = config.get("quantization", config)
            each = block["quantized_layers"] if block["quant_algo"] == MIXED else None
            return {name: ALGORITHMS[(block if each is None else each[name])["quant_algo"]] for name in names}


def _factor(name: str, divisor: Tensor) -> Tensor:
    """The reciprocal of `divisor`, which gives `divisor` back. CheckpointError if no float32 does."""
    factor = divisor.reciprocal()
    if not torch.equal(factor.reciprocal(), divisor):
        raise CheckpointError(f"{name}: its global scale {float(divisor):.9g} has no exact reciprocal in float32")
    return factor


MODELOPT = ModelOpt()
