"""An engine as data: the version its rules were read from, and its kernels in the order it tries them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lowbit.quant.scheme import Scheme

NEEDS_CPU, NEEDS_GPU = "needs a CPU", "needs a GPU"
ELSEWHERE = {True: NEEDS_GPU, False: NEEDS_CPU}  # refusals of kernels for the other kind of machine: on a CPU, on a GPU


class Loaded(Protocol):
    """The properties of a format that engines ask for; export/format.py describes them."""

    @property
    def method(self) -> str: ...

    @property
    def package(self) -> str: ...

    @property
    def through_marlin(self) -> bool: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    def reason_in(self, engine: "Engine", scheme: Scheme) -> str | None:
        """The reason why an engine cannot load weights of a scheme in this format, or None."""


@dataclass(frozen=True)
class FusedLinear:
    """A quantized linear as an engine runs it: a fused set counts as one.

    fmt     format of its files
    scheme  its scheme
    n, k    outputs (of the whole fused set) and inputs
    """

    fmt: Loaded
    scheme: Scheme
    n: int
    k: int


# The reason why a kernel cannot run a layer on a compute capability (None: a CPU), or None.
Reason = Callable[[FusedLinear, int | None], str | None]


# The ways in which a layer runs, from best to worst.
RUNS, WEIGHTS, EXPANDED, FAILS = "runs", "weights alone", "expanded to 16 bits", "fails"
VERDICTS = (RUNS, WEIGHTS, EXPANDED, FAILS)


@dataclass(frozen=True)
class EngineKernel:
    """A kernel of an engine and its rule.

    verdict  RUNS; WEIGHTS if it multiplies inputs in 16 bits whatever the scheme says; EXPANDED if weights are too
    """

    name: str
    reason_against: Reason
    verdict: str = RUNS


@dataclass(frozen=True)
class Engine:
    """An engine: name, version that its rules were read from, and kernels in the order it tries them.

    files  patterns of the weight files that it opens
    """

    name: str
    version: str
    kernels: tuple[EngineKernel, ...]
    files: tuple[str, ...] = ("*.safetensors",)

    def opens(self, fmt: Loaded) -> bool:
        """True if files of the format are of a kind that the engine opens."""
        return not set(self.files).isdisjoint(fmt.files)

    def verdict(self, layer: FusedLinear, capability: int | None) -> str:
        """The way in which the layer runs, one of VERDICTS."""
        kernel, reasons = self.choose(layer, capability)
        found = FAILS if kernel is None else self.kernels[len(reasons)].verdict
        return RUNS if found == WEIGHTS and layer.scheme.inputs is None else found

    def choose(self, layer: FusedLinear, capability: int | None) -> tuple[str | None, dict[str, str]]:
        """The first kernel that accepts the layer, or None; and the reasons of all kernels before it."""
        opened = self.opens(layer.fmt)
        unread = layer.fmt.reason_in(self, layer.scheme) if opened else f"it opens {' and '.join(self.files)} alone"
        if unread is not None:
            return None, {kernel.name: unread for kernel in self.kernels}
        reasons: dict[str, str] = {}
        for kernel in self.kernels:
            reason = kernel.reason_against(layer, capability)
            if reason is None:
                return kernel.name, reasons
            reasons[kernel.name] = reason
        return None, reasons


def all_of(*reasons: Reason) -> Reason:
    """A rule that returns the first objection of any of `reasons`."""

    def reason_against(layer: FusedLinear, capability: int | None) -> str | None:
        return next((found for reason in reasons if (found := reason(layer, capability))), None)

    return reason_against


def on_gpu(since: int, until: int = 999) -> Reason:
    """A rule against CPUs, and against GPUs outside a range of compute capabilities."""

    def reason_against(layer: FusedLinear, capability: int | None) -> str | None:
        if capability is None:
            return NEEDS_GPU
        return None if since <= capability <= until else f"sm_{capability} is not among the GPUs it runs on"

    return reason_against


def on_cpu(layer: FusedLinear, capability: int | None) -> str | None:
    """A rule against GPUs."""
    return None if capability is None else NEEDS_CPU


def weight_only(layer: FusedLinear, capability: int | None) -> str | None:
    """A rule against floats and against quantized inputs."""
    if not layer.scheme.number.is_integer:
        return "takes integers only"
    return "takes weights only" if layer.scheme.inputs else None


def integers(layer: FusedLinear, capability: int | None) -> str | None:
    """A rule against floats and against inputs in 16 bits."""
    if not layer.scheme.number.is_integer:
        return "takes integers only"
    return rounds_inputs(layer, capability)


def of_bits(*bits: int) -> Reason:
    """A rule against integers of other widths."""

    def reason_against(layer: FusedLinear, capability: int | None) -> str | None:
        return None if layer.scheme.bits in bits else f"takes {' and '.join(map(str, bits))} bits only"

    return reason_against


def floats(*kinds: str) -> Reason:
    """A rule against integers and against floats of other kinds; a kind is the name of a scheme with inputs."""

    def reason_against(layer: FusedLinear, capability: int | None) -> str | None:
        kind = str(layer.scheme.weights_only).removesuffix("-a16")
        return None if kind in kinds and not layer.scheme.number.is_integer else f"takes {' and '.join(kinds)} only"

    return reason_against


def rounds_inputs(layer: FusedLinear, capability: int | None) -> str | None:
    """A rule against inputs in 16 bits."""
    return None if layer.scheme.inputs else "takes quantized activations only"
