"""GPTQ: rounding with error compensation. Each column's rounding error is moved to the columns not rounded yet.

The output error of a linear with weight error D is tr(D H D^T), with H the second moment of its inputs. Rounding a
column and then updating the rest of the row with the inverse of H minimizes that error for a fixed column order
(Frantar et al., GPTQ, ICLR 2023). Columns are processed by falling diagonal of H: the ones that matter most are rounded
while most others can still compensate. Groups keep their place, so no index is stored.

Weights of one shape and scheme, experts, are rounded together: one weight is a batch of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.algos.clip import diagonal_moments, round_plainly
from lowbit.quant.algos.few import round_in_ranges
from lowbit.quant.kernels import ops
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme
from lowbit.quant.stats import output_energies

BLOCK = 128  # columns rounded before their errors are applied to the columns behind
DAMPING = 0.01  # fraction of the mean diagonal of H
# Factors of the damping, tried in turn until H can be factored. Then a floor under the diagonal, and float64.
LADDER = (1.0, 4.0, 16.0, 64.0)
DIAGONAL_FLOOR = 1e-4  # fraction of the mean diagonal
COPIES = 8  # float32 copies of moments and of weights that rounding holds at once, at most


@dataclass(frozen=True)
class GptqResult:
    """A rounded weight.

    weight     codes, scales and zeros
    loss       tr(D H D^T) / n, D = rounded - original, over the undamped H
    wanted     (n, k) float32  the compensated weight that was rounded to `weight`, in parts (numerics.in_parts)
    fallbacks  steps beyond the plain algorithm, as sentences; empty if none was needed
    """

    weight: QTensor
    loss: float
    wanted: Tensor
    fallbacks: tuple[str, ...]


@dataclass(frozen=True)
class Factors:
    """Factors of the inverses of damped second moments.

    upper      (e, k, k) float32  U with U^T U = (moment + damping)^-1; the identity where every attempt failed. Row j
               over its diagonal entry: the update of columns j.. that compensates an error in column j
    failed     True for moments without a factor
    fallbacks  of each moment, as in GptqResult
    """

    upper: Tensor
    failed: list[bool]
    fallbacks: list[tuple[str, ...]]


def gptq(
    w: Tensor,
    moment: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    clip: bool = True,
    damping: float = DAMPING,
    divisor: Tensor | None = None,
) -> GptqResult:
    """`w` (n, k) rounded for a small output error over inputs with second moment `moment` (k, k): `gptq_each` of
    one."""
    return gptq_each(w[None, None], moment[None], scheme, scale_dtype, clip, damping, divisor)[0]


def gptq_each(
    w: Tensor,
    moments: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    clip: bool = True,
    damping: float = DAMPING,
    divisor: Tensor | None = None,
) -> list[GptqResult]:
    """Weights of one shape, each rounded for a small output error over inputs with its second moment: r weights for
    each of e inputs. e * r results, in the order of `w`.

    w        (e, r, n, k)  float
    moments  (e, k, k)     float32, per token; symmetric
    clip     first search each group's clipping range
    damping  fraction of the mean diagonal that is added to the diagonal
    divisor  ()  of the scales of all, if they are relative to a tensor's; None for the weight's own, if it is one

    Columns of inputs that never fired are rounded to nearest and take no part. A whole weight is rounded to nearest
    if its moment cannot be factored with any damping, or if that has the smaller loss; `fallbacks` records it.
    ValueError if a moment is not finite. Memory besides the arguments: COPIES of both in float32.
    """
    e, r, _, k = w.shape
    w = w.float()
    if not bool(torch.isfinite(moments).all()):
        raise ValueError("the second moment of its inputs is not finite")
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    factors = inverse_factors(_ordered(moments, order), damping)
    rows = w.view(-1, k)
    if clip:
        nearest = round_in_ranges(rows, scheme, scale_dtype, diagonal_moments(moments, scheme), divisor)
    else:
        nearest = round_plainly(rows, scheme, scale_dtype, divisor)
    parts, _ = numerics.in_parts(rows, scheme, nearest.divisor)
    above = numerics.raised(parts, scheme, nearest.zeros)
    codes, wanted = _sweep(above.view(e, -1, k), factors.upper, nearest, order)
    wanted = wanted - (above - parts) if scheme.weights.minima else wanted
    swept = replace(nearest, codes=codes)
    found, kept = _results(swept, wanted, w, moments, factors), _results(nearest, parts, w, moments, factors)
    return [_better(*pair, factors.failed[place // r]) for place, pair in enumerate(zip(found, kept, strict=True))]


def _results(rounded: QTensor, wanted: Tensor, w: Tensor, moments: Tensor, factors: Factors) -> list[GptqResult]:
    """One result for each of the weights (e, r, n, k) whose rows were rounded."""
    e, r, n, _ = w.shape
    fallbacks = (each for each in factors.fallbacks for _ in range(r))
    columns = rounded.split(e * r), _losses(rounded, w, moments), wanted.split(n), fallbacks
    return [GptqResult(*each) for each in zip(*columns, strict=True)]


def _better(swept: GptqResult, nearest: GptqResult, failed: bool) -> GptqResult:
    """The result with the smaller loss; to nearest if the moment has no factor."""
    if not failed and nearest.loss >= swept.loss:
        return swept
    said = () if failed else ("rounding to nearest had the smaller loss, and was kept",)
    # a copy: a view would keep the weights of all others in memory
    return replace(nearest, wanted=nearest.wanted.clone(), fallbacks=nearest.fallbacks + said)


def _ordered(moments: Tensor, order: Tensor) -> Tensor:
    """The moments (e, k, k) with rows and columns in `order` (e, k)."""
    return moments.gather(1, order[:, :, None].expand_as(moments)).gather(2, order[:, None].expand_as(moments))


def output_loss(weight: QTensor, w: Tensor, moment: Tensor) -> float:
    """Mean squared error per output: tr(D H D^T) / n with D = rounded - w."""
    return _losses(weight, w[None, None], moment[None])[0]


def _losses(weight: QTensor, w: Tensor, moments: Tensor) -> list[float]:
    """`output_loss` of each of the weights (e, r, n, k) whose rows `weight` has."""
    energies = output_energies(weight.dequantize().view(w.shape) - w, moments).flatten()
    return [energy / max(w.shape[2], 1) for energy in energies.tolist()]


def inverse_factors(moments: Tensor, damping: float) -> Factors:
    """The factors of the inverses of `moments` (e, k, k), each damped as little as it needs."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    silent = dead.sum(-1).tolist()
    mean = torch.where(dead, 0, diagonal).sum(-1) / (~dead).sum(-1)
    size = moments.shape[-1]
    upper = torch.empty_like(moments)
    said = [[_of_silent(count, size)] if count else [] for count in silent]
    left = [place for place, count in enumerate(silent) if count < size]
    for rung in _rungs(damping) if left else ():
        upper[left], fits = _factor(_damped(moments[left], dead[left], mean[left], rung).to(rung.dtype))
        fitted = [place for place, fit in zip(left, fits.tolist(), strict=True) if fit]
        for place in fitted:
            said[place] += [rung.name] if rung.name else []
        left = [place for place in left if place not in fitted]
        if not left:
            break
    for place in left:
        said[place].append("its second moment has no Cholesky factor on any rung: rounded to nearest")
    failed = [count == size or place in left for place, count in enumerate(silent)]
    if any(failed):
        upper[failed] = torch.eye(size, device=moments.device)
    return Factors(upper, failed, [tuple(each) for each in said])


def _of_silent(count: int, size: int) -> str:
    if count == size:
        return "no input ever fired: rounded to nearest"
    return f"{count} of {size} inputs never fired: their columns round to nearest"


@dataclass(frozen=True)
class _Rung:
    """An attempt to factor a moment: fraction of its mean diagonal that is added, a floor under the diagonal, dtype,
    and the fallback's description ("" for the plain algorithm)."""

    damping: float
    name: str
    floor: bool = False
    dtype: torch.dtype = torch.float32


def _rungs(damping: float) -> Iterator[_Rung]:
    for step in LADDER:
        yield _Rung(damping * step, "" if step == 1 else f"damping raised to {damping * step:g}")
    most = damping * LADDER[-1]
    yield _Rung(most, f"damping raised to {most:g} and a floor under the diagonal", floor=True)
    yield _Rung(most, "the same, factored in float64", floor=True, dtype=torch.float64)


def _damped(moments: Tensor, dead: Tensor, mean: Tensor, rung: _Rung) -> Tensor:
    """The moments (e, k, k) with a raised diagonal. Inputs that never fired, `dead` (e, k), meet no others and have the
    `mean` (e) of the others."""
    damped = torch.where(dead[:, :, None] | dead[:, None], 0, moments)
    diagonal, mean = damped.diagonal(dim1=-2, dim2=-1), mean[:, None].double()
    diagonal += dead * mean.float()
    diagonal += (mean * rung.damping).float()
    if rung.floor:
        diagonal += ((mean * DIAGONAL_FLOOR).float() - diagonal).clamp(min=0)
    return damped


def _factor(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The upper factor (e, k, k) float32 of each moment's inverse, and True (e) where there is one."""
    lower, failed = torch.linalg.cholesky_ex(moments)
    # a matrix without a factor would make others' inversion fail
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    inverse = torch.cholesky_inverse(torch.where((failed != 0)[:, None, None], eye, lower))
    upper, again = torch.linalg.cholesky_ex(inverse, upper=True)
    upper = upper.float()
    return upper, (failed == 0) & (again == 0) & torch.isfinite(upper).all((-2, -1))


def _sweep(w: Tensor, factor: Tensor, params: QTensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (e n, k) of the weights `w` (e, n, k), whose columns are rounded in `order` (e, k), with the scales and
    zeros of `params`; and the compensated weights (e n, k) that they round. In schemes with minima both are weights
    above these."""
    e, n, k = w.shape
    order_of_rows = order[:, None].expand(e, n, k)
    w = w.gather(2, order_of_rows)
    codes = torch.empty(e, n, k, dtype=params.codes.dtype, device=w.device)
    scheme = params.scheme
    group = order // (k if scheme.group_size == -1 else scheme.group_size)
    scales = numerics.per_row(params.scales.float(), scheme, e * n).view(e, n, -1)
    held = None if scheme.weights.minima else params.zeros
    zeros = torch.zeros_like(scales) if held is None else held.float().view(e, n, -1)
    for start in range(0, k, BLOCK):
        part = slice(start, min(start + BLOCK, k))
        columns = group[:, None, part].expand(e, n, -1)
        steps, offsets = scales.gather(2, columns), zeros.gather(2, columns)
        factors = factor[:, part, part].contiguous()
        rounded, errors = ops.round_block(w[..., part].contiguous(), factors, steps, offsets, scheme.number)
        codes[..., part] = rounded.to(codes.dtype)
        w[..., part.stop :].baddbmm_(errors, factor[:, part, part.stop :], alpha=-1)
        exact = (rounded - offsets) * steps
        w[..., part] = torch.addcmul(exact, errors, factors.diagonal(dim1=-2, dim2=-1)[:, None])
    back = order.argsort(-1)[:, None].expand(e, n, k)
    kept = codes.view(torch.uint8).gather(2, back).view(codes.dtype)  # a CPU gathers no codes of floats
    return kept.view(-1, k), w.gather(2, back).view(-1, k)
