"""The programs that load a checkpoint without changes, by the rules of their engines."""

from collections.abc import Container, Mapping

from lowbit.export.engines.lowbit import LOWBIT
from lowbit.export.engines.table import MACHINES, fused_linears
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.engines.vllm import VLLM
from lowbit.export.format import Format
from lowbit.quant.scheme import Scheme

SGLANG = "SGLang"


def readers_of(
    fmt: Format, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], refused: Container[str] = ()
) -> tuple[str, ...]:
    """Names of the engines that have a kernel for every layer on one machine or another.

    refused  engines that do not load the model's family

    SGLang was checked once without a GPU (docs/FORMATS.md): it takes what vLLM takes, except static scales of inputs.
    """
    layers = fused_linears(fmt, schemes, shapes).values()
    found = [
        engine.name
        for engine in (VLLM, TRANSFORMERS, LOWBIT)
        if engine.name not in refused
        and any(all(engine.choose(layer, capability)[0] for layer in layers) for capability in MACHINES.values())
    ]
    if VLLM.name in found and not any(scheme.static_inputs for scheme in schemes.values()):
        found.insert(1, SGLANG)
    return tuple(found)
