"""An engine as a value: the version that its rules were read from, and the kernels that it tries, in its order."""

from collections.abc import Callable
from dataclasses import dataclass

from lowbit.export.format import Format
from lowbit.quant.scheme import Scheme

NEEDS_CPU, NEEDS_GPU = "needs a CPU", "needs a GPU"
ELSEWHERE = {True: NEEDS_GPU, False: NEEDS_CPU}  # what a kernel for the other kind of machine says on a CPU, on a GPU


@dataclass(frozen=True)
class Layer:
    """A quantized linear as an engine runs it, those that it fuses as one.

    fmt     the format of its files
    scheme  how it is quantized
    n, k    outputs (of all that are fused) and inputs
    """

    fmt: Format
    scheme: Scheme
    n: int
    k: int


# What a kernel has against a layer on a compute capability (None: a CPU), or None.
Reason = Callable[[Layer, int | None], str | None]


@dataclass(frozen=True)
class EngineKernel:
    """A kernel of an engine and its rule."""

    name: str
    reason_against: Reason


@dataclass(frozen=True)
class Engine:
    """An engine: its name, the version that its rules were read from, and its kernels in the order it tries them."""

    name: str
    version: str
    kernels: tuple[EngineKernel, ...]

    def choose(self, layer: Layer, capability: int | None) -> tuple[str | None, dict[str, str]]:
        """The first kernel that takes the layer, or None; and the reason of each one before it."""
        reasons: dict[str, str] = {}
        for kernel in self.kernels:
            reason = kernel.reason_against(layer, capability)
            if reason is None:
                return kernel.name, reasons
            reasons[kernel.name] = reason
        return None, reasons


def all_of(*reasons: Reason) -> Reason:
    """The first thing that any of `reasons` has against a layer."""

    def reason_against(layer: Layer, capability: int | None) -> str | None:
        return next((found for reason in reasons if (found := reason(layer, capability))), None)

    return reason_against


def on_gpu(since: int, until: int = 999) -> Reason:
    """Against CPUs, and GPUs outside a range of compute capabilities."""

    def reason_against(layer: Layer, capability: int | None) -> str | None:
        if capability is None:
            return NEEDS_GPU
        return None if since <= capability <= until else f"sm_{capability} is not among the GPUs it runs on"

    return reason_against


def on_cpu(layer: Layer, capability: int | None) -> str | None:
    """Against GPUs."""
    return None if capability is None else NEEDS_CPU


def weight_only(layer: Layer, capability: int | None) -> str | None:
    """Against floats and against quantized inputs."""
    if not layer.scheme.number.is_integer:
        return "takes integers only"
    return "takes weights only" if layer.scheme.inputs else None


def integers(layer: Layer, capability: int | None) -> str | None:
    """Against floats and against inputs in 16 bits."""
    if not layer.scheme.number.is_integer:
        return "takes integers only"
    return None if layer.scheme.inputs else "takes quantized activations only"


def floats(layer: Layer, capability: int | None) -> str | None:
    """Against integers."""
    return "takes floats only" if layer.scheme.number.is_integer else None


def float_inputs(layer: Layer, capability: int | None) -> str | None:
    """Against integers and against inputs in 16 bits."""
    return floats(layer, capability) or (None if layer.scheme.inputs else "takes quantized activations only")
