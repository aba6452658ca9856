"""The programs that load a checkpoint without changes, by the rules of their engines."""

from collections.abc import Container, Mapping

from lowbit.export.engines.engine import FAILS
from lowbit.export.engines.table import fused_linears
from lowbit.export.engines.verdicts import verdicts_of
from lowbit.export.format import Format
from lowbit.quant.scheme import Scheme


def readers_of(
    fmt: Format, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], refused: Container[str] = ()
) -> tuple[str, ...]:
    """Names of the engines that have a kernel for every layer on one machine or another.

    refused  engines that do not load the model's family
    """
    verdicts = verdicts_of(fused_linears(fmt, schemes, shapes).values(), refused)
    return tuple(name for name, found in verdicts.items() if set(found.values()) != {FAILS})
