"""GPTQ: rounding with error compensation. Each column's rounding error is moved to the columns not rounded yet.

The output error of a linear with weight error D is tr(D H D^T), with H the second moment of its inputs. Rounding a
column and then updating the rest of the row with the inverse of H minimizes that error for a fixed column order
(Frantar et al., GPTQ, ICLR 2023). Columns are processed by falling diagonal of H: the ones that matter most are rounded
while most others can still compensate. Groups keep their place, so no index is stored.
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
from lowbit.quant.stats import output_energy

BLOCK = 128  # columns rounded before their errors are applied to the columns behind
DAMPING = 0.01  # fraction of the mean diagonal of H
# Factors of the damping, tried in turn until H can be factored. Then a floor under the diagonal, and float64.
LADDER = (1.0, 4.0, 16.0, 64.0)
DIAGONAL_FLOOR = 1e-4  # fraction of the mean diagonal


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


def gptq(
    w: Tensor,
    moment: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    clip: bool = True,
    damping: float = DAMPING,
    divisor: Tensor | None = None,
) -> GptqResult:
    """`w` rounded for a small output error over inputs with second moment `moment`.

    w        (n, k)  float
    moment   (k, k)  float32, per token; symmetric
    clip     first search each group's clipping range
    damping  fraction of the mean diagonal that is added to the diagonal
    divisor  ()  of the scales, if they are relative to a tensor's; None for the weight's own

    Columns of inputs that never fired are rounded to nearest and take no part. The whole weight is rounded to nearest
    if its moment cannot be factored with any damping, or if that has the smaller loss; `fallbacks` records it.
    ValueError if `moment` is not finite.
    """
    w = w.float()
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("the second moment of its inputs is not finite")
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor, fallbacks = inverse_factor(moment[order][:, order], damping)
    if clip:
        nearest = round_in_ranges(w, scheme, scale_dtype, diagonal_moments(moment, scheme), divisor)
    else:
        nearest = round_plainly(w, scheme, scale_dtype, divisor)
    plain = output_loss(nearest, w, moment)
    parts, _ = numerics.in_parts(w, scheme, nearest.divisor)
    if factor is None:
        return GptqResult(nearest, plain, parts, fallbacks)
    above = numerics.raised(parts, scheme, nearest.zeros)
    codes, wanted = (each[:, order.argsort()].contiguous() for each in _sweep(above[:, order], factor, nearest, order))
    wanted = wanted - (above - parts) if scheme.weights.minima else wanted
    weight = replace(nearest, codes=codes)
    loss = output_loss(weight, w, moment)
    if plain < loss:
        said = "rounding to nearest had the smaller loss, and was kept"
        return GptqResult(nearest, plain, parts, (*fallbacks, said))
    return GptqResult(weight, loss, wanted, fallbacks)


def output_loss(weight: QTensor, w: Tensor, moment: Tensor) -> float:
    """Mean squared error per output: tr(D H D^T) / n with D = rounded - w."""
    return output_energy(weight.dequantize() - w, moment) / max(w.shape[0], 1)


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper U (k, k) with U^T U = (moment + damping)^-1, and the fallbacks used; None if every attempt fails.

    Row j of U over its diagonal entry: the update of columns j.. that compensates an error in column j.
    """
    fallbacks: list[str] = []
    dead = moment.diagonal() <= 0
    if bool(dead.all()):
        return None, ("no input ever fired: rounded to nearest",)
    if bool(dead.any()):
        fallbacks.append(f"{int(dead.sum())} of {len(moment)} inputs never fired: their columns round to nearest")
    mean = float(moment.diagonal()[~dead].mean())
    moment = torch.where(dead[:, None] | dead[None], torch.zeros_like(moment), moment)
    for name, attempt in _attempts(moment, dead, mean, damping):
        factor = _factor(attempt)
        if factor is not None:
            return factor, (*fallbacks, *([name] if name else []))
    return None, (*fallbacks, "its second moment has no Cholesky factor on any rung: rounded to nearest")


def _attempts(moment: Tensor, dead: Tensor, mean: float, damping: float) -> Iterator[tuple[str, Tensor]]:
    """Moments to try to factor, each with its fallback's description ("" for the plain algorithm)."""
    eye = torch.eye(len(moment), device=moment.device)
    alive = moment + eye * dead * mean
    for step in LADDER:
        yield ("" if step == 1 else f"damping raised to {damping * step:g}"), alive + eye * (mean * damping * step)
    strongest = alive + eye * (mean * damping * LADDER[-1])
    floor = DIAGONAL_FLOOR * mean
    floored = strongest + eye * (floor - strongest.diagonal()).clamp(min=0)
    yield f"damping raised to {damping * LADDER[-1]:g} and a floor under the diagonal", floored
    yield "the same, factored in float64", floored.double()


def _factor(moment: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(moment)
    if int(info) != 0:
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper.float() if int(info) == 0 and bool(torch.isfinite(upper).all()) else None


def _sweep(w: Tensor, factor: Tensor, params: QTensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, k) of the columns of `w`, in the order given, with the scales and zeros of `params`; and the
    compensated weight (n, k) that they round. In schemes with minima both are weights above these."""
    n, k = w.shape
    w = w.clone()
    codes = torch.empty(n, k, dtype=params.codes.dtype, device=w.device)
    scheme = params.scheme
    group = order // (k if scheme.group_size == -1 else scheme.group_size)
    scales = numerics.per_row(params.scales.float(), scheme, n)
    held = None if scheme.weights.minima else params.zeros
    zeros = torch.zeros_like(scales) if held is None else held.float()
    number = scheme.number
    for start in range(0, k, BLOCK):
        part = slice(start, min(start + BLOCK, k))
        columns = group[part]
        rounded, errors = ops.round_block(
            w[:, part].contiguous(), factor[part, part].contiguous(), scales[:, columns], zeros[:, columns],
            number,
        )  # fmt: skip
        codes[:, part] = rounded.to(codes.dtype)
        w[:, part.stop :].addmm_(errors, factor[part, part.stop :], alpha=-1)
        exact = (rounded - zeros[:, columns]) * scales[:, columns]
        w[:, part] = torch.addcmul(exact, errors, factor.diagonal()[part])
    return codes, w
