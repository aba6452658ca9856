"""Rules of SGLang, from its `layers/quantization/compressed_tensors` (`get_min_capability`) and public threads.

Integers were loaded here without a GPU (docs/FORMATS.md); floats are by its source alone.
"""

from lowbit.export.engines.engine import (
    WEIGHTS,
    Engine,
    EngineKernel,
    FusedLinear,
    all_of,
    floats,
    integers,
    of_bits,
    on_gpu,
    rounds_inputs,
    weight_only,
)
from lowbit.export.engines.vllm import marlin, whole_blocks


def _own_scales(layer: FusedLinear, capability: int | None) -> str | None:
    """A rule against one calibrated scale: int8 has room for one of q, k and v, which bring three (IndexError)."""
    return "one calibrated scale of inputs does not load" if layer.scheme.static_inputs else None


SGLANG = Engine(
    "SGLang",
    "0.5.23",
    (
        EngineKernel("CUTLASS int8", all_of(integers, of_bits(8), _own_scales, on_gpu(75, 90))),
        EngineKernel("CUTLASS fp8", all_of(floats("fp8"), rounds_inputs, on_gpu(89))),
        EngineKernel("block fp8", all_of(floats("fp8-block"), rounds_inputs, on_gpu(89), whole_blocks)),
        EngineKernel("Marlin fp8", all_of(floats("fp8"), on_gpu(80)), WEIGHTS),
        EngineKernel("CUTLASS nvfp4", all_of(floats("nvfp4"), rounds_inputs, on_gpu(100))),
        EngineKernel("Marlin nvfp4", all_of(floats("nvfp4"), on_gpu(80)), WEIGHTS),
        EngineKernel("Marlin mxfp4", all_of(floats("mxfp4"), on_gpu(80)), WEIGHTS),
        EngineKernel("scaled_mm mxfp8", all_of(floats("mxfp8"), rounds_inputs, on_gpu(100))),
        EngineKernel("Marlin", all_of(weight_only, of_bits(4, 8), on_gpu(80), marlin)),
    ),
)
