"""Rules of vLLM, from its `kernels/linear` and `layers/quantization`."""

from lowbit.export.engines.engine import (
    WEIGHTS,
    Engine,
    EngineKernel,
    FusedLinear,
    Reason,
    all_of,
    floats,
    integers,
    of_bits,
    on_cpu,
    on_gpu,
    rounds_inputs,
    weight_only,
)
from lowbit.quant.numbers import FP8


def _through_marlin(layer: FusedLinear, capability: int | None) -> str | None:
    """A rule of the formats that vLLM turns into Marlin's before it chooses a kernel."""
    return marlin(layer, capability) if layer.fmt.through_marlin and capability is not None else None


def _machete(layer: FusedLinear, capability: int | None) -> str | None:
    if layer.scheme.group_size not in (-1, 64, 128):
        return f"{layer.scheme}: groups of 64, 128 or a row"
    return None if not layer.k % 64 and not layer.n % 128 else f"{layer.n} x {layer.k}: multiples of 128 x 64"


def marlin(layer: FusedLinear, capability: int | None) -> str | None:
    """A rule of the Marlin kernels for integers."""
    if layer.scheme.bits == 8 and not layer.scheme.symmetric:
        return "8 bits with zeros"
    sizes = (-1, 32, 64, 128)
    return None if layer.scheme.group_size in sizes else f"{layer.scheme}: groups of 32, 64, 128 or a row"


def _triton(layer: FusedLinear, capability: int | None) -> str | None:
    if layer.scheme.bits != 4 or layer.n % 8:
        return f"{layer.scheme} of {layer.n} outputs: 4 bits, multiples of 8"
    return None if layer.scheme.group_size in (-1, 32, 64, 128, 256) else f"{layer.scheme}: no such groups"


def _cpu_wna16(layer: FusedLinear, capability: int | None) -> str | None:
    if layer.scheme.bits != 4 or layer.n % 32 or layer.k % 32:
        return f"{layer.scheme} of {layer.n} x {layer.k}: on a CPU vLLM takes 4 bits, multiples of 32 x 32"
    return None


def _humming(layer: FusedLinear, capability: int | None) -> str | None:
    return None if layer.scheme.symmetric else "takes symmetric weights only"


def whole_blocks(layer: FusedLinear, capability: int | None) -> str | None:
    """The reason why blocks do not divide the layer, or None; vLLM asks that of inputs, and of fused outputs."""
    rows, columns = layer.scheme.rows, layer.scheme.group_size
    whole = not layer.k % columns and not layer.n % rows
    return None if whole else f"{layer.n} x {layer.k} is not a multiple of {rows} x {columns}"


def _fp8_inputs(layer: FusedLinear, capability: int | None) -> str | None:
    inputs = layer.scheme.inputs
    return None if inputs is not None and inputs.number == FP8 else "takes fp8 inputs only"


def _cutlass_w4a8(layer: FusedLinear, capability: int | None) -> str | None:
    whole = layer.scheme.group_size == 128 and not layer.k % 128 and not layer.n % 128
    return None if whole else f"{layer.scheme} of {layer.n} x {layer.k}: groups of 128, multiples of 128 x 128"


def _wna16(*reasons: Reason) -> Reason:
    return all_of(weight_only, of_bits(4, 8), _through_marlin, *reasons)


VLLM = Engine(
    "vLLM",
    "0.32",
    (
        EngineKernel("CUTLASS int8", all_of(integers, of_bits(8), on_gpu(75, 90))),
        EngineKernel("CPU int8", all_of(on_cpu, integers, of_bits(8))),
        EngineKernel("CUTLASS W4A8", all_of(_fp8_inputs, of_bits(4), on_gpu(90, 90), _cutlass_w4a8)),
        EngineKernel("CPU fp8", all_of(floats("fp8"), rounds_inputs, on_cpu)),
        EngineKernel("CUTLASS fp8", all_of(floats("fp8"), rounds_inputs, on_gpu(89))),
        EngineKernel("block fp8", all_of(floats("fp8-block"), rounds_inputs, on_gpu(89), whole_blocks)),
        EngineKernel("Marlin fp8", all_of(floats("fp8"), on_gpu(75)), WEIGHTS),
        EngineKernel("Marlin block fp8", all_of(floats("fp8-block"), on_gpu(75), whole_blocks), WEIGHTS),
        EngineKernel("CUTLASS nvfp4", all_of(floats("nvfp4"), rounds_inputs, on_gpu(100))),
        EngineKernel("Marlin nvfp4", all_of(floats("nvfp4"), on_gpu(75)), WEIGHTS),
        EngineKernel("Marlin mxfp4", all_of(floats("mxfp4"), on_gpu(80)), WEIGHTS),
        EngineKernel("FlashInfer mxfp8", all_of(floats("mxfp8"), rounds_inputs, on_gpu(100))),
        EngineKernel("Marlin mxfp8", all_of(floats("mxfp8"), on_gpu(75)), WEIGHTS),  # bfloat16: vLLM #45922
        EngineKernel(
            "Humming (package humming-kernels)", all_of(weight_only, of_bits(2, 3, 5, 6, 7), on_gpu(75), _humming)
        ),
        EngineKernel("Machete", _wna16(on_gpu(90, 90), _machete)),
        EngineKernel("Marlin", _wna16(on_gpu(75), marlin)),
        EngineKernel("Triton W4A16", _wna16(on_gpu(75), _triton)),
        EngineKernel("CPU WNA16", _wna16(on_cpu, _cpu_wna16)),
    ),
)
