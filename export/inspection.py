"""Inspection of a quantized checkpoint from its headers."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.convert import command_for_llama_cpp
from lowbit.export.engines.engine import ELSEWHERE
from lowbit.export.engines.table import (
    ENGINES,
    MACHINES,
    PARALLEL_SIZES,
    engines_for,
    fused_linears,
    reason_against_parallel,
)
from lowbit.export.engines.verdicts import Verdicts, verdicts_of
from lowbit.export.formats import LogicalTensors
from lowbit.quant.naming import split_sets
from lowbit.quant.scheme import Scheme


@dataclass(frozen=True)
class InspectedLinear:
    """A quantized linear: its scheme, outputs, inputs and bytes."""

    scheme: Scheme
    n: int
    k: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.n * self.k)


@dataclass(frozen=True)
class Inspection:
    """Results of an inspection.

    format       the format's name
    linears      quantized linears by name
    left         parameters of each linear left in 16 bits, by name
    other_bytes  bytes of all tensors that do not belong to a quantized linear
    split        fused sets whose members have different schemes
    parents      fused linears whose NVFP4 scales have different parents, with their names
    parallel     number of GPUs -> the reason why the linears cannot be split between them, or None
    kernels      machine -> engine -> kernel (None: no kernel) -> number of linears or fused sets it runs
    verdicts     engine -> machine -> how all of it runs (engines/engine.py, VERDICTS)
    refusals     machine -> engine -> reason -> number of linears or fused sets without a kernel
    opened       engines that open files of this kind; the others run none of them
    for_llama_cpp  the command that writes the same weights for llama.cpp, if there is one
    checked_files  files with a known, correct checksum, after reading all weights; None if not checked
    """

    format: str
    linears: dict[str, InspectedLinear]
    left: dict[str, int]
    other_bytes: int
    split: dict[str, list[str]]
    parents: dict[str, list[str]]
    parallel: dict[int, str | None]
    kernels: dict[str, dict[str, Counter[str | None]]]
    refusals: dict[str, dict[str, Counter[str]]]
    verdicts: Verdicts
    opened: tuple[str, ...]
    for_llama_cpp: str | None
    checked_files: int | None = None

    @property
    def coverage(self) -> float:
        """Quantized parameters as a fraction of all linear parameters."""
        quantized = sum(linear.n * linear.k for linear in self.linears.values())
        return quantized / max(quantized + sum(self.left.values()), 1)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the quantized linears, including scales, zeros and shapes."""
        weights = sum(linear.n * linear.k for linear in self.linears.values())
        return 8 * sum(linear.nbytes for linear in self.linears.values()) / max(weights, 1)

    def roles(self) -> dict[tuple[str, Scheme, int, int], int]:
        """The number of linears per (name without its numbers, scheme, shape)."""
        return Counter(
            (re.sub(r"\.\d+\.", ".*.", name), linear.scheme, linear.n, linear.k)
            for name, linear in self.linears.items()
        )

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        linears = {
            name: {
                "scheme": str(linear.scheme),
                "shape": [linear.n, linear.k],
                "bytes": linear.nbytes,
                "bits_per_weight": round(linear.bits_per_weight, 4),
            }
            for name, linear in self.linears.items()
        }
        return {
            "format": self.format,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "quantized_bytes": sum(linear.nbytes for linear in self.linears.values()),
            "other_bytes": self.other_bytes,
            "coverage": round(self.coverage, 6),
            "linears": linears,
            "left": self.left,
            "split_fused_sets": self.split,
            "different_global_scales": self.parents,
            "tensor_parallel": {str(size): reason or "yes" for size, reason in self.parallel.items()},
            "engines": {engine.name: engine.version for engine in ENGINES.values()},
            "kernels": {
                machine: {engine: {kernel or "none": n for kernel, n in found.items()} for engine, found in row.items()}
                for machine, row in self.kernels.items()
            },
            "verdicts": self.verdicts,
            "for_llama_cpp": self.for_llama_cpp,
            "refusals": {
                machine: {engine: dict(reasons) for engine, reasons in row.items() if reasons}
                for machine, row in self.refusals.items()
            },
        }


def inspect_checkpoint(source: LogicalTensors, linears: Mapping[str, int], heads: tuple[int, int] | None) -> Inspection:
    """The inspection of `source`.

    linears  parameters of every linear of the model, by its name in the file
    heads    numbers of query heads, and of key and value heads

    CheckpointError if it is not quantized, or if shapes contradict the format.
    """
    if source.format is None or not source.schemes:
        raise CheckpointError(f"{source.checkpoint.directory}: not quantized: there is nothing to inspect")
    entries, fmt = source.checkpoint.entries, source.format
    owned = {name: fmt.parts(name) for name in source.schemes}
    shared = Counter(part for parts in owned.values() for part in parts)
    found: dict[str, InspectedLinear] = {}
    for name, scheme in source.schemes.items():
        nbytes = sum(entries[key].nbytes // shared[key] for key in owned[name] if key in entries)
        found[name] = InspectedLinear(scheme, *source.shape(name), nbytes)
    shapes = {name: (linear.n, linear.k) for name, linear in found.items()}
    kernels, refusals = _kernels(source, shapes)
    return Inspection(
        format=fmt.name,
        linears=found,
        left={name: size for name, size in linears.items() if name not in found},
        other_bytes=source.checkpoint.nbytes - sum(linear.nbytes for linear in found.values()),
        split=split_sets({**linears, **found}, source.schemes),
        parents=source.different_parents(),
        parallel={size: reason_against_parallel(size, source.schemes, shapes, heads) for size in PARALLEL_SIZES},
        kernels=kernels,
        refusals=refusals,
        verdicts=verdicts_of(fused_linears(fmt, source.schemes, shapes).values()),
        opened=tuple(engine.name for engine in engines_for(fmt)),
        for_llama_cpp=command_for_llama_cpp(fmt, source.schemes, shapes, source.checkpoint, source.cache),
    )


def _kernels(
    source: LogicalTensors, shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, dict[str, Counter[str | None]]], dict[str, dict[str, Counter[str]]]]:
    """The kernels of the layers on each machine, and the reasons if there is none."""
    assert source.format is not None
    layers = Counter(fused_linears(source.format, source.schemes, shapes).values())
    kernels: dict[str, dict[str, Counter[str | None]]] = {}
    refusals: dict[str, dict[str, Counter[str]]] = {}
    for machine, capability in MACHINES.items():
        for name, engine in ENGINES.items():
            taken = kernels.setdefault(machine, {}).setdefault(name, Counter())
            refused = refusals.setdefault(machine, {}).setdefault(name, Counter())
            for layer, count in layers.items():
                kernel, reasons = engine.choose(layer, capability)
                taken[kernel] += count
                if kernel is None:
                    told = {each: reason for each, reason in reasons.items() if reason != ELSEWHERE[capability is None]}
                    refused["; ".join(f"{each}: {reason}" for each, reason in told.items())] += count
    return kernels, refusals
