"""Conversion between formats and schemes without requantizing: weights are written otherwise, and keep their values."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import Checkpoint, open_checkpoint, require_same_source
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.llama_cpp import LLAMA_CPP
from lowbit.export.format import Format, reading
from lowbit.export.formats import LogicalTensors, require_fit, require_model
from lowbit.export.restate import divisor_for, largest_scale, reason_against, restated
from lowbit.export.writer import CheckpointWriter
from lowbit.quant.naming import parent_set
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

TABLES = ("embed_tokens", "wte")  # the last parts of names of input embeddings


@dataclass
class Conversion:
    """Results of a conversion.

    schemes   new scheme by linear
    exact     number of linears with bit-identical weights
    rounded   for each of the others, the largest relative change of a scale, or of a minimum in parts of its scale
    rewrites  counts of changed encodings ("symmetric codes as unsigned ones with a zero of 8")
    divisors  divisor of scales by linear, where its new scheme has one and its old one had none
    caveat    what other programs make of the model in its new format, if anything is to be said
    """

    schemes: dict[str, Scheme]
    divisors: dict[str, Tensor] = field(default_factory=dict)
    exact: int = 0
    rounded: dict[str, float] = field(default_factory=dict)
    rewrites: Counter[str] = field(default_factory=Counter)
    caveat: str | None = None


def convert(
    source: LogicalTensors,
    fmt: Format,
    unquantized: Iterable[str],
    output: Path,
    shard: int,
    finished: bool = True,
    scheme: Scheme | None = None,
) -> Conversion:
    """Write the checkpoint of `source` in the format `fmt` into the existing directory `output`.

    unquantized  names of linears left in 16 bits
    shard        bytes of the largest weight file
    finished     False leaves the sealing to the caller
    scheme       of all quantized linears, which must have the same values in it; None for their own

    `output` holds only copied companions. The weights are written, then read back and compared. Raises CheckpointError
    with the reason if the format cannot hold a weight, if a scale is outside the range of its dtype, or if another
    tensor of the checkpoint has a name that the format gives to a linear's tensor.
    """
    done = Conversion(target_schemes(source, fmt, scheme))
    _refuse_parents(source)
    _refuse_ties(source, fmt)
    require_model(fmt, source.checkpoint.config, output)
    done.caveat = fmt.caveat_of_model(source.checkpoint.config)
    if source.cache is not None and source.cache not in fmt.caches:
        raise CheckpointError(
            f"{source.checkpoint.directory}: it has scales of a key-value cache ({source.cache}), format {fmt.name} "
            f"holds {' or '.join(fmt.caches) or 'none'}"
        )
    shapes = {name: source.shape(name) for name in done.schemes}
    require_fit(fmt, done.schemes, shapes)
    _refuse_clashes(source, fmt, done.schemes)
    done.divisors = _divisors(source, done.schemes)
    writer = CheckpointWriter(fmt, output, shard)
    biases = {bias: stack for stack in source.stacks if (bias := f"{stack}_bias") in source.checkpoint.entries}
    for name in source.names:
        if name in biases:
            for linear, bias in zip(source.stacks[biases[name]], source.checkpoint.read(name), strict=True):
                writer.add(f"{linear}.bias", bias.contiguous())
        elif not source.is_quantized(name):
            kept = fmt.kept(name, source.checkpoint.read(name), source.checkpoint.config)
            if kept is not None:
                writer.add(name, kept)
        for linear in source.linears_of(name):
            writer.add_weight(linear, _converted(source.qtensor(linear), linear, fmt, done))
    writer.add_cache(source.cache_scales())
    writer.finish(source.checkpoint.config, done.schemes, unquantized, source.cache)
    _verify(source, fmt, done, output)
    require_same_source(source.checkpoint, {})
    if finished:
        fmt.container.seal(output)
    return done


def _refuse_ties(source: LogicalTensors, fmt: Format) -> None:
    """Raise CheckpointError for a quantized table that serves as the head too, if `fmt` has no such table."""
    tied = source.format is not None and source.format.ties_head and source.checkpoint.config.get("tie_word_embeddings")
    tables = [name for name in source.schemes if name.rpartition(".")[2] in TABLES]
    if tied and tables and not fmt.ties_head:
        raise CheckpointError(
            f"{source.checkpoint.directory}: {tables[0]} is quantized and serves as the head too, which format "
            f"{fmt.name} does not hold; `quantize` takes the file as its original"
        )


def _refuse_parents(source: LogicalTensors) -> None:
    """Raise CheckpointError if linears that engines run as one matrix have scales with different divisors."""
    for members in source.different_parents().values():
        raise CheckpointError(
            f"{source.checkpoint.directory}: {', '.join(members)} have different global scales, and engines run them "
            "as one matrix with one of these; `quantize` takes the checkpoint as its original and gives them one"
        )


def _divisors(source: LogicalTensors, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """The divisor of each linear's scales where its new scheme has one and its old one has none: alike for linears that
    share it (`parent_set`)."""
    fresh = [name for name, scheme in schemes.items() if scheme.weights.parent]
    fresh = [name for name in fresh if not source.schemes[name].weights.parent]
    largest: dict[str, float] = {}
    for name in fresh:
        key = parent_set(name)
        largest[key] = max(largest.get(key, 0), largest_scale(source.qtensor(name), schemes[name]))
    return {name: divisor_for(largest[parent_set(name)] or 1) for name in fresh}


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


def command_for_llama_cpp(
    fmt: Format,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    checkpoint: Checkpoint,
    cache: str | None = None,
) -> str | None:
    """The command that writes a checkpoint for llama.cpp, with the same weights; None if llama.cpp opens its files
    already, or if GGUF does not hold them.

    schemes, shapes  scheme and (n, k) by linear, in the format `fmt`
    checkpoint       it, or its original
    cache            its key-value cache: "fp8", "fp8-head", or None
    """
    gguf = FORMATS["gguf"]
    after = {name: gguf.alike(scheme) for name, scheme in schemes.items()}
    exact = all(scheme.symmetric and scheme.inputs is None for scheme in schemes.values())
    if LLAMA_CPP.opens(fmt) or not exact or cache is not None:
        return None
    if any(gguf.reason_against(new) or gguf.reason_against_shape(new, *shapes[name]) for name, new in after.items()):
        return None
    with checkpoint.companions() as companions:
        reason = gguf.reason_against_model(checkpoint.config, companions)
    return None if reason else f"lowbit convert DIR NEW{gguf.container.suffix}"


def target_schemes(source: LogicalTensors, fmt: Format, scheme: Scheme | None = None) -> dict[str, Scheme]:
    """The scheme of each quantized linear in `fmt`, for the same weights: `scheme`, or the one closest to its own.

    If all zeros are in the middle of the codes, the scheme becomes symmetric, if the format has symmetric ones. A
    format with one scheme for all linears gets the largest group size that divides every linear's, and zeros for all if
    any linear has them.
    """
    if not source.schemes:
        raise CheckpointError(f"{source.checkpoint.directory}: not quantized; `quantize --format {fmt.name}` does that")
    if scheme is not None:
        return dict.fromkeys(source.schemes, scheme)
    schemes = dict(source.schemes)
    if _all_middle(source):
        schemes = {name: scheme.with_zeros(False) for name, scheme in schemes.items()}
    schemes = {name: fmt.alike(scheme) for name, scheme in schemes.items()}
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
    with reading(name):
        weight, rewrites = express(weight, done.schemes[name], done.divisors.get(name))
    done.rewrites.update(rewrites)
    change = 0.0
    floats = weight.scheme.weights.scales is None
    if floats and fmt.scale_dtype is not None and weight.scales.dtype != fmt.scale_dtype:
        scales = weight.scales.to(fmt.scale_dtype)
        change = _largest_change(name, weight.scales, scales)
        weight = replace(weight, scales=scales)
    if weight.scheme.weights.minima and weight.zeros is not None and not weight.scheme.weights.span:
        minima = weight.zeros.to(torch.float16).float()
        change = max(change, _largest_step(weight, minima))
        weight = replace(weight, zeros=minima)
    if change:
        done.rounded[name] = change
    else:
        done.exact += 1
    return weight


def express(weight: QTensor, scheme: Scheme, divisor: Tensor | None = None) -> tuple[QTensor, list[str]]:
    """The same weight in another scheme, and the list of changed encodings. Nothing is rounded.

    Smaller groups repeat a larger group's scale and zero. Signed codes become unsigned codes with a zero of 2^(bits-1),
    and back if every zero is that. Other schemes are those of `restated`. ValueError, with numbers, if one has no such
    values.

    divisor  of the scales, if the scheme has one and the weight has none
    """
    old, k = weight.scheme, weight.shape[1]
    if _gets_minima(old, scheme):
        return _with_minima(weight, scheme)
    if weight.order is not None or not _is_rewritten(old, scheme, k):
        reason = reason_against(weight, scheme)
        if reason:
            raise ValueError(reason)
        return restated(weight, scheme, divisor), [f"{old} as {scheme}"]
    codes, scales, zeros, rewrites = weight.codes, weight.scales, weight.zeros, []
    bias = 1 << (scheme.bits - 1)
    if old.symmetric and not scheme.symmetric:
        codes = (codes.to(torch.int16) + bias).to(torch.uint8)
        zeros = torch.full_like(scales, bias, dtype=torch.int32)
        rewrites.append(f"symmetric codes as unsigned ones with a zero of {bias}")
    elif scheme.symmetric and not old.symmetric:
        if not _is_middle(weight):
            raise ValueError(f"its zeros are not all {bias}, and {scheme} has none")
        codes, zeros = (codes.to(torch.int16) - bias).to(torch.int8), None
        rewrites.append(f"codes whose zeros are all {bias} as symmetric ones")
    repeats = scheme.groups(k) // old.groups(k)
    if repeats > 1:
        scales = scales.repeat_interleave(repeats, 1)
        zeros = None if zeros is None else zeros.repeat_interleave(repeats, 1)
        rewrites.append(f"each scale of {old.granularity} {repeats} times for {scheme.granularity}")
    inputs = weight.input_scale if scheme.static_inputs else None
    return QTensor(codes, scales, zeros, scheme, inputs, weight.divisor), rewrites


def _gets_minima(old: Scheme, scheme: Scheme) -> bool:
    """True if `scheme` has minima of a floating-point type in the place of the zeros of `old`."""
    side = scheme.weights
    zeros = old.number == scheme.number and not old.symmetric and not old.weights.blocks
    return side.minima and not side.span and zeros and old.inputs is None


def _with_minima(weight: QTensor, scheme: Scheme) -> tuple[QTensor, list[str]]:
    """The same codes and scales with a minimum, zero * scale in float32, in the place of each zero."""
    assert weight.zeros is not None
    if weight.order is not None:
        raise ValueError("its inputs are in act-order, which no file is written in")
    repeats = scheme.groups(weight.shape[1]) // weight.scheme.groups(weight.shape[1])
    minima = (weight.zeros.float() * weight.scales.float()).repeat_interleave(repeats, 1)
    scales = weight.scales.repeat_interleave(repeats, 1)
    return QTensor(weight.codes, scales, minima, scheme), ["zeros as minima, rounded to float16"]


def _is_rewritten(old: Scheme, scheme: Scheme, k: int) -> bool:
    """True if a weight of `k` inputs has its own codes in another scheme, shifted at most."""
    if replace(old, inputs=None) == replace(scheme, inputs=None):
        return old.inputs == scheme.inputs or not scheme.static_inputs
    blocks = old.weights.blocks or scheme.weights.blocks
    integers = old.number.is_integer and scheme.number.is_integer and old.bits == scheme.bits and not blocks
    return integers and old.inputs == scheme.inputs and scheme.groups(k) % old.groups(k) == 0


def _largest_step(weight: QTensor, minima: Tensor) -> float:
    """The largest change of a minimum, as a fraction of its group's scale. ValueError if one becomes infinite."""
    assert weight.zeros is not None
    if not bool(torch.isfinite(minima).all()):
        raise ValueError(f"a minimum of {float(weight.zeros.abs().max()):.3g} does not fit float16")
    return float(((minima - weight.zeros) / weight.scales.float()).abs().max())


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
    before, after = source.cache_scales(), written.cache_scales()
    if written.cache != source.cache or any(not torch.equal(before[name], scale) for name, scale in after.items()):
        raise CheckpointError(f"{output}: the scales of its cache do not read back as they were written")
    for name in done.schemes:
        meant, _ = express(source.qtensor(name), done.schemes[name], done.divisors.get(name))
        found = written.qtensor(name)
        scales = meant.scales.to(found.scales.dtype)
        zeros = meant.zeros
        if zeros is not None and meant.scheme.weights.minima and not meant.scheme.weights.span:
            zeros = zeros.to(torch.float16).float()
        same_zeros = zeros is None or (found.zeros is not None and torch.equal(zeros, found.zeros))
        # compared as bytes: torch cannot compare float8
        same_codes = torch.equal(meant.codes.view(torch.uint8), found.codes.view(torch.uint8))
        ones = ((meant.divisor, found.divisor), (meant.input_scale, found.input_scale))
        same_ones = all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in ones)
        if not (same_codes and torch.equal(scales, found.scales) and same_zeros and same_ones):
            raise CheckpointError(f"{output}: {name} does not read back as it was written; the disk may be failing")
