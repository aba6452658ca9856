"""The engines, the machines they run on, and the fused linears they form from a checkpoint's."""

from collections.abc import Mapping

from lowbit.export.engines.engine import Engine, FusedLinear
from lowbit.export.engines.llama_cpp import LLAMA_CPP
from lowbit.export.engines.lowbit import LOWBIT
from lowbit.export.engines.sglang import SGLANG
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.engines.vllm import VLLM
from lowbit.export.format import Format
from lowbit.quant.naming import EXPERT, ROW_PARALLEL, fused_set
from lowbit.quant.scheme import Scheme

ENGINES = {engine.name: engine for engine in (VLLM, SGLANG, TRANSFORMERS, LLAMA_CPP, LOWBIT)}
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


def engines_for(fmt: Format) -> list[Engine]:
    """The engines that open files of the format; what the others say of it goes without saying."""
    return [engine for engine in ENGINES.values() if engine.opens(fmt)]


def fused_linears(
    fmt: Format, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, FusedLinear]:
    """The linears that engines run, by the key of the fused set; each expert counts alone."""
    layers: dict[str, FusedLinear] = {}
    for name, scheme in schemes.items():
        n, k = shapes[name]
        key = name if EXPERT.search(name) else fused_set(name)
        wider = layers[key].n + n if key in layers else n
        layers[key] = FusedLinear(fmt, scheme, wider, k)
    return layers


def reason_against_part(name: str, scheme: Scheme, n: int, k: int, size: int) -> str | None:
    """The reason why the groups or blocks of a linear (n, k) do not divide its parts on `size` GPUs, or None."""
    if name.rpartition(".")[2] in ROW_PARALLEL:
        cut = k % size or (k // size) % max(scheme.group_size, 1)
        return f"{k} inputs in parts of {k / size:g}, in groups of {scheme.granularity}" if cut else None
    if n % size:
        return f"{n} outputs"
    return f"{n} outputs in parts of {n // size}, in blocks of {scheme.rows}" if (n // size) % scheme.rows else None


def reason_against_parallel(
    size: int, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], heads: tuple[int, int] | None
) -> str | None:
    """The reason why the linears cannot be split between `size` GPUs, or None.

    heads  numbers of query heads, and of key and value heads; None if unknown
    """
    if heads is not None:
        queries, values = heads
        if queries % size or (values % size and size % values):
            return f"{queries} query heads and {values} of keys and values"
    for name, scheme in schemes.items():
        reason = reason_against_part(name, scheme, *shapes[name], size)
        if reason:
            return f"{name}: {reason}"
    return None
