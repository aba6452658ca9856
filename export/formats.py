"""The formats for writing and reading quantized weights, by name."""

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.cache import cache_names, usable
from lowbit.export.checkpoint import Checkpoint
from lowbit.export.dialects import readable
from lowbit.export.format import Format, in_groups, reading
from lowbit.quant.naming import joined_set
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme


def require_model(fmt: Format, config: Mapping[str, Any], companions: Path) -> None:
    """Raise CheckpointError with the reason if `fmt` cannot hold the model of `config`, whose other files lie in
    `companions`."""
    reason = fmt.reason_against_model(config, companions)
    if reason:
        raise CheckpointError(f"format {fmt.name} cannot hold this model: {reason}")


def require_fit(fmt: Format, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise CheckpointError with the reason if `fmt` cannot hold these linears.

    schemes, shapes  scheme and (n, k) by linear
    """
    for name, scheme in schemes.items():
        reason = fmt.reason_against(scheme) or fmt.reason_against_shape(scheme, *shapes[name])
        if reason:
            raise CheckpointError(f"format {fmt.name} cannot hold {name} as {scheme}: {reason}")
    kinds = Counter(schemes.values())
    if fmt.uniform and len(kinds) > 1:
        smallest = min((scheme.group_size for scheme in kinds if scheme.group_size > 0), default=-1)
        in_size_alone = len({scheme.with_group_size(smallest) for scheme in kinds}) == 1
        raise CheckpointError(
            f"format {fmt.name} holds one scheme, and these linears have {len(kinds)}: {describe_schemes(schemes)}"
            + (f"; --group-size {smallest} may suit all" if in_size_alone else "")
        )


def describe_schemes(schemes: Mapping[str, Scheme]) -> str:
    """Counts of schemes as text, most frequent first: `int4-g128 (210 linears)`."""
    counts = Counter(map(str, schemes.values()))
    return ", ".join(f"{scheme} ({count} linears)" for scheme, count in counts.most_common())


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class LogicalTensors:
    """A checkpoint's tensors under the names of an unquantized model: `P.weight`, packed or not."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.format = _format_of(checkpoint)
        packed = self.format.linears(checkpoint.entries, checkpoint.shape) if self.format else []
        self.schemes = self.format.schemes_of(checkpoint.quantization or {}, packed) if self.format else {}
        # scales of a key-value cache: attention -> part -> the file's name
        self.cached = cache_names(checkpoint.entries) if self.format else {}
        self.stacks = self._stacks(self.format) if self.format else {}
        # every expert of a stack is read from the same two tensors
        self._stored = lru_cache(2)(checkpoint.read) if self.stacks else checkpoint.read
        if self.format:
            self._refuse_unscaled(self.format)

    def _stacks(self, fmt: Format) -> dict[str, list[str]]:
        """The linears in each stack of experts, in their order, by the stack's name."""
        stacks: dict[str, list[str]] = {}
        for name in self.schemes:
            stack = fmt.stack_of(name)
            if stack is not None:
                stacks.setdefault(stack, []).append(name)
        return stacks

    def _refuse_unscaled(self, fmt: Format) -> None:
        """CheckpointError for float8 weights without scales, which are not complete weights in a quantized
        checkpoint."""
        for name, entry in self.checkpoint.entries.items():
            linear = name.removesuffix(".weight")
            if entry.dtype in FLOAT8 and linear != name and linear not in self.schemes:
                raise CheckpointError(
                    f"{self.checkpoint.directory}: {name} is {entry.dtype} and has no {fmt.marker}; "
                    "the checkpoint is incomplete"
                )

    @property
    def names(self) -> list[str]:
        """Names of all tensors, with `P.weight`, or a stack's name, in place of a quantized linear's tensors."""
        hidden = {part for name in self.schemes for part in (self.format.parts(name) if self.format else ())}
        hidden |= {name for parts in self.cached.values() for name in parts.values()}
        stacked = {name for members in self.stacks.values() for name in members}
        single = [f"{name}.weight" for name in self.schemes if name not in stacked]
        return [*(name for name in self.checkpoint.entries if name not in hidden), *single, *self.stacks]

    def is_quantized(self, name: str) -> bool:
        """True if the tensor `name` of an unquantized model is quantized here."""
        return name in self.stacks or (name.endswith(".weight") and name.removesuffix(".weight") in self.schemes)

    def linears_of(self, name: str) -> list[str]:
        """The quantized linears in the tensor `name` of an unquantized model: itself, experts of a stack, or none."""
        single = [name.removesuffix(".weight")] if self.is_quantized(name) else []
        return self.stacks.get(name, single)

    def different_parents(self) -> dict[str, list[str]]:
        """Linears that engines run as one matrix, with the scales of one of them, and whose scales have other
        parents."""
        sets: dict[str, dict[str, float | None]] = {}
        for name, scheme in self.schemes.items():
            if scheme.weights.parent and self.format:
                sets.setdefault(joined_set(name), {})[name] = self.format.divisor(name, self.checkpoint.read)
        return {key: list(members) for key, members in sets.items() if len(set(members.values())) > 1}

    def shape(self, linear: str) -> tuple[int, int]:
        """Outputs and inputs of a quantized linear, from the file headers."""
        assert self.format is not None
        checkpoint = self.checkpoint
        try:
            return self.format.shape(linear, checkpoint.shape, checkpoint.read, self.schemes[linear])
        except ValueError as error:
            raise CheckpointError(f"{linear}: its tensors have no such shape as a weight's ({error})") from error

    def qtensor(self, linear: str) -> QTensor:
        """The quantized weight of `linear`."""
        assert self.format is not None
        weight = self.format.read(linear, self._stored, self.schemes[linear])
        groups = f"{linear}.{self.format.grouping}"
        if groups not in self.checkpoint.entries:
            return weight
        with reading(linear):
            return in_groups(weight, self._stored(groups))

    @property
    def cache(self) -> str | None:
        """The key-value cache that the configuration declares: "fp8", "fp8-head", or None."""
        return self.format.cache_of(self.checkpoint.quantization or {}) if self.format else None

    def cache_scales(self) -> dict[str, Tensor]:
        """The scales of the declared key-value cache as `A.k_scale`, float32; empty if none is declared."""
        if self.cache is None:
            return {}
        return {
            f"{attention}.{part}_scale": usable(name, self.checkpoint.read(name))
            for attention, parts in self.cached.items()
            for part, name in parts.items()
        }

    @property
    def parameters(self) -> int:
        """Numbers in all tensors, scales and zeros of quantized linears aside."""
        dense = sum(self.checkpoint.entries[name].numel for name in self.names if not self.is_quantized(name))
        return dense + sum(math.prod(self.shape(linear)) for linear in self.schemes)

    def read(self, name: str) -> Tensor:
        """The tensor `name`. A quantized weight is dequantized, in the dtype of its scales."""
        return self._read(name, exact=False)

    def exact(self, name: str) -> Tensor:
        """The tensor `name`. A quantized weight is dequantized in float32."""
        return self._read(name, exact=True)

    def _read(self, name: str, exact: bool) -> Tensor:
        if not self.is_quantized(name):
            return self.checkpoint.read(name)
        if name in self.stacks:
            return torch.stack([self._dense(linear, exact).T for linear in self.stacks[name]])
        return self._dense(name.removesuffix(".weight"), exact)

    def _dense(self, linear: str, exact: bool) -> Tensor:
        weight = self.qtensor(linear)
        return weight.dequantize(torch.float32 if exact else weight.scales.dtype)


def _format_of(checkpoint: Checkpoint) -> Format | None:
    config = checkpoint.quantization
    if config is None:
        return None
    for fmt in readable():
        if fmt.recognizes(config):
            return fmt
    details = (config.get(key) for key in ("quant_method", "checkpoint_format", "version"))
    raise CheckpointError(
        f"{checkpoint.directory}: quantized as {' '.join(str(detail) for detail in details if detail)!r}, which is not "
        f"read here; known: {', '.join(fmt.name for fmt in readable())}"
    )
