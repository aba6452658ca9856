"""What engines do with a checkpoint: how they split its linears, and which kernel takes which.

The rules are those of vLLM 0.32 (its `kernels/linear` and `layers/quantization`), of transformers 5.23 with
compressed-tensors 0.20, gptqmodel 7.7 and optimum 2.3, and of our own kernels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowbit.export.format import Format
from lowbit.quant.kernels import w8a8
from lowbit.quant.kernels.packed import TILE_ROWS, reason_against_packing
from lowbit.quant.naming import EXPERT, ROW_PARALLEL, fused_set
from lowbit.quant.scheme import Scheme

PARALLEL_SIZES = (1, 2, 4, 8, 16)
# Compute capability of each generation; None is a CPU.
MACHINES: dict[str, int | None] = {
    "Turing, sm_75": 75,
    "Ampere, sm_80": 80,
    "Ampere, sm_86": 86,
    "Ada, sm_89": 89,
    "Hopper, sm_90": 90,
    "Blackwell, sm_100": 100,
    "Blackwell, sm_120": 120,
    "CPU": None,
}
NEEDS_CPU, NEEDS_GPU = "needs a CPU", "needs a GPU"
ELSEWHERE = {True: NEEDS_GPU, False: NEEDS_CPU}  # what a kernel for the other kind of machine says on a CPU, on a GPU


@dataclass(frozen=True)
class Layer:
    """A quantized linear as an engine runs it, those that it fuses as one.

    fmt     the format's name
    scheme  how it is quantized
    n, k    outputs (of all that are fused) and inputs
    """

    fmt: str
    scheme: Scheme
    n: int
    k: int


@dataclass(frozen=True)
class EngineKernel:
    """A kernel of an engine: what it has against a layer on a compute capability (None: a CPU), or None."""

    name: str
    reason_against: Callable[[Layer, int | None], str | None]


def layers_of(fmt: Format, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Layer]:
    """What engines run, by the key of the fused set; each expert stays alone."""
    layers: dict[str, Layer] = {}
    for name, scheme in schemes.items():
        n, k = shapes[name]
        key = name if EXPERT.search(name) else fused_set(name)
        wider = layers[key].n + n if key in layers else n
        layers[key] = Layer(fmt.name, scheme, wider, k)
    return layers


def reason_against_parallel(
    size: int, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], heads: tuple[int, int] | None
) -> str | None:
    """Why the linears cannot be split between `size` GPUs, or None.

    heads  query heads, and those of keys and values, where they are known
    """
    if heads is not None:
        queries, values = heads
        if queries % size or (values % size and size % values):
            return f"{queries} query heads and {values} of keys and values"
    for name, scheme in schemes.items():
        n, k = shapes[name]
        leaf = name.rpartition(".")[2]
        if leaf in ROW_PARALLEL and (k % size or (k // size) % max(scheme.group_size, 1)):
            return f"{name}: {k} inputs in parts of {k / size:g}, in groups of {scheme.granularity}"
        if leaf not in ROW_PARALLEL and n % size:
            return f"{name}: {n} outputs"
    return None


def choose(engine: str, layer: Layer, capability: int | None) -> tuple[str | None, dict[str, str]]:
    """The engine's first kernel that takes the layer, or None; and what each one before it had against it."""
    reasons: dict[str, str] = {}
    for kernel in ENGINES[engine]:
        reason = kernel.reason_against(layer, capability)
        if reason is None:
            return kernel.name, reasons
        reasons[kernel.name] = reason
    return None, reasons


def _on_gpu(since: int, until: int = 999) -> Callable[[Layer, int | None], str | None]:
    """Against CPUs, and GPUs outside a range of compute capabilities."""

    def reason_against(layer: Layer, capability: int | None) -> str | None:
        if capability is None:
            return NEEDS_GPU
        return None if since <= capability <= until else f"sm_{capability} is not among the GPUs it runs on"

    return reason_against


def _weight_only(layer: Layer, capability: int | None) -> str | None:
    if not layer.scheme.number.is_integer:
        return "takes integers only"
    return "takes weights only" if layer.scheme.inputs else None


def _float(layer: Layer, capability: int | None) -> str | None:
    return "takes floats only" if layer.scheme.number.is_integer else None


def _float_inputs(layer: Layer, capability: int | None) -> str | None:
    return _float(layer, capability) or (None if layer.scheme.inputs else "takes quantized activations only")


def _known_to_vllm(layer: Layer, capability: int | None) -> str | None:
    """What vLLM refuses before it looks for a kernel."""
    if layer.fmt.startswith("gptq") and not layer.scheme.symmetric:
        return "vLLM takes GPTQ files only where they are symmetric"
    if layer.fmt in ("gptq", "gptq_v2", "awq") and capability is not None:
        return _marlin(layer, capability)
    return None


def _machete(layer: Layer, capability: int | None) -> str | None:
    if layer.scheme.group_size not in (-1, 64, 128):
        return f"{layer.scheme}: groups of 64, 128 or a row"
    return None if not layer.k % 64 and not layer.n % 128 else f"{layer.n} x {layer.k}: multiples of 128 x 64"


def _marlin(layer: Layer, capability: int | None) -> str | None:
    if layer.scheme.bits == 8 and not layer.scheme.symmetric:
        return "8 bits with zeros"
    sizes = (-1, 32, 64, 128)
    return None if layer.scheme.group_size in sizes else f"{layer.scheme}: groups of 32, 64, 128 or a row"


def _triton(layer: Layer, capability: int | None) -> str | None:
    if layer.scheme.bits != 4 or layer.n % 8:
        return f"{layer.scheme} of {layer.n} outputs: 4 bits, multiples of 8"
    return None if layer.scheme.group_size in (-1, 32, 64, 128, 256) else f"{layer.scheme}: no such groups"


def _cpu_wna16(layer: Layer, capability: int | None) -> str | None:
    if capability is not None:
        return NEEDS_CPU
    if layer.scheme.bits != 4 or layer.n % 32 or layer.k % 32:
        return f"{layer.scheme} of {layer.n} x {layer.k}: on a CPU vLLM takes 4 bits, multiples of 32 x 32"
    return None


def _int8(layer: Layer, capability: int | None) -> str | None:
    if not layer.scheme.number.is_integer:
        return "takes integers only"
    return None if layer.scheme.inputs else "takes quantized activations only"


def _cpu_int8(layer: Layer, capability: int | None) -> str | None:
    return NEEDS_CPU if capability is not None else _int8(layer, capability)


def _expanded(layer: Layer, capability: int | None) -> str | None:
    """transformers with compressed-tensors: dense weights, made on the first forward pass."""
    if layer.fmt != "compressed-tensors":
        return "another format"
    if not layer.scheme.symmetric:
        return "with compressed-tensors 0.20 it loads asymmetric weights only with dequantize=True"
    return None


def _gptqmodel(layer: Layer, capability: int | None) -> str | None:
    return "another format" if layer.fmt == "compressed-tensors" else None


def _ours(layer: Layer, capability: int | None) -> str | None:
    """The packed kernels."""
    return reason_against_packing(layer.n, layer.k, layer.scheme.group_size, TILE_ROWS)


def _our_int8(layer: Layer, capability: int | None) -> str | None:
    """The kernels that multiply int8 by int8."""
    return w8a8.reason_against_packing(layer.n, layer.k)


def _on_cpu(layer: Layer, capability: int | None) -> str | None:
    return NEEDS_CPU if capability else None


def _all(*reasons: Callable[[Layer, int | None], str | None]) -> Callable[[Layer, int | None], str | None]:
    """The first thing that any of `reasons` has against a layer."""

    def reason_against(layer: Layer, capability: int | None) -> str | None:
        return next((found for reason in reasons if (found := reason(layer, capability))), None)

    return reason_against


# In the order in which each engine tries them.
ENGINES: dict[str, tuple[EngineKernel, ...]] = {
    "vLLM": (
        EngineKernel("CUTLASS int8", _all(_int8, _on_gpu(75, 90))),
        EngineKernel("CPU int8", _cpu_int8),
        EngineKernel("CPU fp8", _all(_float_inputs, _on_cpu)),
        EngineKernel("CUTLASS fp8", _all(_float_inputs, _on_gpu(89))),
        EngineKernel("Marlin fp8", _all(_float, _on_gpu(75))),
        EngineKernel("Machete", _all(_weight_only, _known_to_vllm, _on_gpu(90, 90), _machete)),
        EngineKernel("Marlin", _all(_weight_only, _known_to_vllm, _on_gpu(75), _marlin)),
        EngineKernel("Triton W4A16", _all(_weight_only, _known_to_vllm, _on_gpu(75), _triton)),
        EngineKernel("CPU WNA16", _all(_weight_only, _known_to_vllm, _cpu_wna16)),
    ),
    "transformers": (
        EngineKernel("expanded to 16 bits", _expanded),
        EngineKernel("gptqmodel", _gptqmodel),
    ),
    "lowbit": (
        EngineKernel("w8a8", _all(_int8, _our_int8, _on_gpu(80))),
        EngineKernel("wna16", _all(_weight_only, _ours, _on_gpu(80))),
        EngineKernel("expanded to 16 bits", _float),
        EngineKernel(
            "reference", _all(_weight_only, _ours, lambda layer, capability: NEEDS_CPU if capability else None)
        ),
    ),
}
