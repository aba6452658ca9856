"""Rules of lowbit's own kernels."""

from lowbit import __version__
from lowbit.export.engines.engine import (
    EXPANDED,
    WEIGHTS,
    Engine,
    EngineKernel,
    FusedLinear,
    all_of,
    integers,
    of_bits,
    on_cpu,
    on_gpu,
)
from lowbit.quant.kernels import w8a8
from lowbit.quant.kernels.packed import TILE_ROWS, has_kernel, reason_against_packing
from lowbit.quant.numbers import FP8
from lowbit.quant.scheme import FP8_BLOCK, FP8_GROUP, INPUTS


def _packed(layer: FusedLinear, capability: int | None) -> str | None:
    if not has_kernel(layer.scheme):
        return "takes integers of 2 to 8 bits, fp8 and fp4 only, without super-blocks"
    return reason_against_packing(layer.n, layer.k, layer.scheme.group_size, TILE_ROWS)


def _without_kernel(layer: FusedLinear, capability: int | None) -> str | None:
    return "takes only numbers that have no kernel" if has_kernel(layer.scheme) else None


def _plain_inputs(layer: FusedLinear, capability: int | None) -> str | None:
    return "takes inputs in 16 bits only" if layer.scheme.inputs else None


def _float(layer: FusedLinear, capability: int | None) -> str | None:
    taken = not layer.scheme.number.is_integer or layer.scheme.wide_inputs
    return None if taken else "takes floats only, and int4 with inputs in 8 bits"


def _int8_by_int4(layer: FusedLinear, capability: int | None) -> str | None:
    taken = layer.scheme.wide_inputs and layer.scheme.inputs == INPUTS["a8token"]
    return None if taken else "takes int4 with int8 inputs only"


def _fp8_inputs(layer: FusedLinear, capability: int | None) -> str | None:
    inputs, blocks = layer.scheme.inputs, layer.scheme.weights == FP8_BLOCK
    taken = layer.scheme.number == FP8 and inputs in (
        (FP8_GROUP,) if blocks else (INPUTS["afp8token"], INPUTS["afp8tensor"])
    )
    return None if taken else "takes fp8 inputs by token or by tensor, and in groups with blocks, only"


def _not_int8(layer: FusedLinear, capability: int | None) -> str | None:
    return None if _float(layer, capability) is None else _plain_inputs(layer, capability)


def _eight_bits(layer: FusedLinear, capability: int | None) -> str | None:
    return w8a8.reason_against_packing(layer.n, layer.k, layer.scheme.weights == FP8_BLOCK)


LOWBIT = Engine(
    "lowbit",
    __version__,
    (
        EngineKernel("w8a8", all_of(integers, of_bits(8), _eight_bits, on_gpu(80))),
        EngineKernel("w4a8", all_of(_int8_by_int4, _packed, on_gpu(90, 90))),
        EngineKernel("w8a8 in fp8", all_of(_fp8_inputs, _eight_bits, on_gpu(90, 90))),
        EngineKernel("wna16", all_of(_plain_inputs, _packed, on_gpu(80))),
        # other inputs are rounded to their numbers and multiplied in 16 bits
        EngineKernel("wna16 with rounded inputs", all_of(_float, _packed, on_gpu(80)), WEIGHTS),
        EngineKernel("expanded to 16 bits", _without_kernel, EXPANDED),
        EngineKernel("reference", all_of(_not_int8, _packed, on_cpu)),
    ),
    files=("*.safetensors", "*.gguf"),
)
