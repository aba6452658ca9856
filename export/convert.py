"""Conversion between formats without requantizing: codes, zeros and scales are re-encoded, not recomputed."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint, require_same_source
from lowbit.export.format import Format
from lowbit.export.formats import LogicalTensors, require_fit
from lowbit.export.writer import CheckpointWriter
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme


@dataclass
class Conversion:
    """Results of a conversion.

    schemes   new scheme by linear
    exact     number of linears with bit-identical weights
    rounded   for each of the others, the largest relative change of a scale
    rewrites  counts of changed encodings ("symmetric codes as unsigned ones with a zero of 8")
    """

    schemes: dict[str, Scheme]
    exact: int = 0
    rounded: dict[str, float] = field(default_factory=dict)
    rewrites: Counter[str] = field(default_factory=Counter)


def convert(
    source: LogicalTensors,
    fmt: Format,
    unquantized: Iterable[str],
    output: Path,
    shard: int,
    finished: bool = True,
) -> Conversion:
    """Write the checkpoint of `source` in the format `fmt` into the existing directory `output`.

    unquantized  names of linears left in 16 bits
    shard        bytes of the largest weight file

    finished     False leaves the sealing to the caller

    `output` holds only copied companions. The weights are written, then read back and compared. Raises CheckpointError
    with the reason if the format cannot hold a weight, if a scale is outside the range of its dtype, or if another
    tensor of the checkpoint has a name that the format gives to a linear's tensor.
    """
    done = Conversion(target_schemes(source, fmt))
    shapes = {name: source.shape(name) for name in done.schemes}
    require_fit(fmt, done.schemes, shapes)
    _refuse_clashes(source, fmt, done.schemes)
    writer = CheckpointWriter(fmt, output, shard)
    for name in source.names:
        linear = name.removesuffix(".weight")
        if linear == name or linear not in done.schemes:
            writer.add(name, source.checkpoint.read(name))
            continue
        writer.add_weight(linear, _converted(source.qtensor(linear), linear, fmt, done))
    writer.finish(source.checkpoint.config, done.schemes, unquantized)
    _verify(source, fmt, done, output)
    require_same_source(source.checkpoint, {})
    if finished:
        fmt.container.seal(output)
    return done


def _refuse_clashes(source: LogicalTensors, fmt: Format, schemes: Mapping[str, Scheme]) -> None:
    """Raise CheckpointError if a copied tensor has the name of a converted linear's tensor."""
    written = {f"{name}.{suffix}" for name in schemes for suffix in fmt.suffixes}
    weights = {f"{name}.weight" for name in schemes}
    clashing = [name for name in source.names if name in written and name not in weights]
    if clashing:
        raise CheckpointError(
            f"{source.checkpoint.directory}: {clashing[0]!r} belongs to none of its quantized weights, and has "
            f"the name of a part of a {fmt.name} weight; take it out of the file"
        )


def target_schemes(source: LogicalTensors, fmt: Format) -> dict[str, Scheme]:
    """The scheme of each quantized linear in `fmt`, for the same weights.

    If all zeros are in the middle of the codes, the scheme becomes symmetric, if the format has symmetric ones. A
    format with one scheme for all linears gets the largest group size that divides every linear's, and zeros for all if
    any linear has them.
    """
    if not source.schemes:
        raise CheckpointError(f"{source.checkpoint.directory}: not quantized; `quantize --format {fmt.name}` does that")
    schemes = dict(source.schemes)
    if _all_middle(source):
        schemes = {name: scheme.with_zeros(False) for name, scheme in schemes.items()}
    wants_zeros = all(_refuses_symmetric(fmt, scheme) for scheme in schemes.values())
    if fmt.uniform:
        wants_zeros = wants_zeros or not all(scheme.symmetric for scheme in schemes.values())
        size = _common_group_size(source)
        schemes = {
            name: scheme.with_group_size(size) if _is_regrouped(scheme) else scheme for name, scheme in schemes.items()
        }
    if wants_zeros:
        schemes = {name: scheme.with_zeros(True) for name, scheme in schemes.items()}
    return schemes


def _refuses_symmetric(fmt: Format, scheme: Scheme) -> bool:
    """True if the format accepts the scheme only with zeros."""
    return bool(fmt.reason_against(scheme)) and not fmt.reason_against(scheme.with_zeros(True))


def _all_middle(source: LogicalTensors) -> bool:
    """True if the checkpoint has zeros, all in the middle of the codes."""
    with_zeros = [name for name, scheme in source.schemes.items() if not scheme.symmetric]
    return bool(with_zeros) and all(_is_middle(source.qtensor(name)) for name in with_zeros)


def _is_middle(weight: QTensor) -> bool:
    return weight.zeros is not None and bool((weight.zeros == 1 << (weight.scheme.bits - 1)).all())


def _is_regrouped(scheme: Scheme) -> bool:
    """True if a wider group can be written as several narrower ones."""
    return scheme.number.is_integer and scheme.inputs is None


def _common_group_size(source: LogicalTensors) -> int:
    """The largest group size that divides every linear's; -1 if all are per channel."""
    sizes = {name: scheme.group_size for name, scheme in source.schemes.items() if _is_regrouped(scheme)} or {"": -1}
    if set(sizes.values()) == {-1}:
        return -1
    return math.gcd(*(source.shape(name)[1] if size == -1 else size for name, size in sizes.items()))


def _converted(weight: QTensor, name: str, fmt: Format, done: Conversion) -> QTensor:
    """`weight` in its new scheme and the format's scale type; changes are recorded in `done`."""
    weight, rewrites = express(weight, done.schemes[name])
    done.rewrites.update(rewrites)
    change = 0.0
    floats = weight.scheme.weights.scales is None
    if floats and fmt.scale_dtype is not None and weight.scales.dtype != fmt.scale_dtype:
        scales = weight.scales.to(fmt.scale_dtype)
        change = _largest_change(name, weight.scales, scales)
        weight = replace(weight, scales=scales)
    if change:
        done.rounded[name] = change
    else:
        done.exact += 1
    return weight


def express(weight: QTensor, scheme: Scheme) -> tuple[QTensor, list[str]]:
    """The same weight in another scheme, and the list of changed encodings. Nothing is rounded.

    Smaller groups repeat a larger group's scale and zero. Signed codes become unsigned codes with a zero of 2^(bits-1),
    and back if every zero is that.
    """
    old, k = weight.scheme, weight.shape[1]
    assert (old.bits, old.number.is_integer, old.inputs) == (scheme.bits, scheme.number.is_integer, scheme.inputs)
    codes, scales, zeros, rewrites = weight.codes, weight.scales, weight.zeros, []
    bias = 1 << (scheme.bits - 1)
    if old.symmetric and not scheme.symmetric:
        codes = (codes.to(torch.int16) + bias).to(torch.uint8)
        zeros = torch.full_like(scales, bias, dtype=torch.int32)
        rewrites.append(f"symmetric codes as unsigned ones with a zero of {bias}")
    elif scheme.symmetric and not old.symmetric:
        assert _is_middle(weight)
        codes, zeros = (codes.to(torch.int16) - bias).to(torch.int8), None
        rewrites.append(f"codes whose zeros are all {bias} as symmetric ones")
    repeats = scheme.groups(k) // old.groups(k)
    if repeats > 1:
        scales = scales.repeat_interleave(repeats, 1)
        zeros = None if zeros is None else zeros.repeat_interleave(repeats, 1)
        rewrites.append(f"each scale of {old.granularity} {repeats} times for {scheme.granularity}")
    return QTensor(codes, scales, zeros, scheme, weight.input_scale, weight.divisor), rewrites


def _largest_change(name: str, before: Tensor, after: Tensor) -> float:
    """The largest relative change of a scale. CheckpointError if one becomes zero or infinite."""
    lost = int((~torch.isfinite(after) | (after == 0)).sum())
    if lost:
        low, high = float(before.min()), float(before.max())
        raise CheckpointError(
            f"{name}: {lost} of {before.numel()} scales ({low:.3g} to {high:.3g}) do not fit {after.dtype}, the "
            "type of this format's scales"
        )
    return float(((after.double() - before.double()) / before.double()).abs().max())


def _verify(source: LogicalTensors, fmt: Format, done: Conversion, output: Path) -> None:
    """Raise CheckpointError if the files do not read back as the weights of `source`."""
    written = LogicalTensors(open_checkpoint(output, finished=False))
    if written.format is not fmt or written.schemes != done.schemes:
        raise CheckpointError(f"{output}: its configuration does not read back as it was written")
    for name in done.schemes:
        meant, _ = express(source.qtensor(name), done.schemes[name])
        found = written.qtensor(name)
        scales = meant.scales.to(found.scales.dtype)
        same_zeros = meant.zeros is None or (found.zeros is not None and torch.equal(meant.zeros, found.zeros))
        # compared as bytes: torch cannot compare float8
        same_codes = torch.equal(meant.codes.view(torch.uint8), found.codes.view(torch.uint8))
        ones = ((meant.divisor, found.divisor), (meant.input_scale, found.input_scale))
        same_ones = all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in ones)
        if not (same_codes and torch.equal(scales, found.scales) and same_zeros and same_ones):
            raise CheckpointError(f"{output}: {name} does not read back as it was written; the disk may be failing")
