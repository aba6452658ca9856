"""Clipping search: the fraction of each group's range with the least error in the linear's output.

A group contributes x_g . (q - w)_g to the output error, so its expected squared error is (q - w)_g^T M_g (q - w)_g with
M_g the second moment of the group's inputs. No activations are kept in memory, and every token counts. (AWQ's own
clipping measures the same error on a sample of tokens.)

Weights of one shape and scheme, experts, are searched together: `w` has their rows one behind the other, and moments
have a first dimension more, one for each weight.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.algos.fit import search_pairs
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme
from lowbit.quant.stats import weighed

SHRINKS = tuple(1 - step / 40 for step in range(25))  # 1 down to 0.4
# Scales of few bits are chosen among their numbers. Those below and above that of the whole range: all numbers of e4m3
# from half of it to twice (four-over-six takes two of them, 1 and 1.5); of powers of two, one on each side.
AROUND = (1.0, *(step / 16 for step in range(8, 33) if step != 16))
POWERS = (1.0, 0.5, 2.0)


def group_moments(second_moment: Tensor, scheme: Scheme) -> Tensor:
    """The diagonal blocks (..., g, group_size, group_size) of second moments (..., k, k)."""
    cut = (scheme.groups(second_moment.shape[-1]), -1)
    return second_moment.unflatten(-1, cut).unflatten(-3, cut).diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()


def diagonal_moments(second_moment: Tensor, scheme: Scheme) -> Tensor:
    """group_moments with off-diagonal entries set to zero: inputs weighted one by one, for rounding that corrects
    itself."""
    return torch.diag_embed(group_moments(second_moment, scheme).diagonal(dim1=-2, dim2=-1)).contiguous()


def shrinks_for(scheme: Scheme) -> Sequence[float]:
    """The fractions of a range to search for the scheme's scales."""
    coarse = scheme.weights.scales
    if coarse is None:
        return SHRINKS
    return AROUND if coarse.mantissa else POWERS


def plain_shrink(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, divisor: Tensor | None = None) -> Tensor | float:
    """The fractions of ranges to keep where nothing is known of inputs.

    All of each, where scales are of a floating-point type; those of few bits are searched on the error of the weight.
    """
    side = scheme.weights
    return 1.0 if side.scales is None and not side.minima else search_shrink(w, scheme, scale_dtype, None, divisor)


def round_plainly(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, divisor: Tensor | None = None) -> QTensor:
    """`w` (n, k) rounded to the nearest codes of those ranges."""
    return round_to_nearest(w, scheme, scale_dtype, plain_shrink(w, scheme, scale_dtype, divisor), divisor)


def group_losses(error: Tensor, moments: Tensor) -> Tensor:
    """Squared output error (n, g) of a weight error (n, k) per group, without cross terms between groups."""
    parts = error.view(-1, *moments.shape[-3:-1])
    return (weighed(parts, moments) * parts).sum(-1)


def pieces_of(w: Tensor, scheme: Scheme, moments: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The rows of `w` in pieces (numerics.pieces_of), and their moments: of several whole weights, or a part of one."""
    if moments is None or moments.ndim == 3:
        yield from ((w[rows], moments) for rows, _ in numerics.pieces_of(w, scheme))
        return
    n = len(w) // len(moments)
    most = max(numerics.piece_size(w) // max(n * w.shape[1], 1), 1)
    for some, of_some in zip(w.split(most * n), moments.split(most), strict=True):
        yield from [(some, of_some)] if len(of_some) > 1 else pieces_of(some, scheme, of_some[0])


def search_shrink(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor | None, divisor: Tensor | None = None
) -> Tensor:
    """The fraction (n, g) of each group's range with the least output error; in schemes with minima (2, n, g), of scale
    and minimum.

    w        (n, k)  float
    moments  (g, group_size, group_size) float32, from group_moments; None to round for the weight itself
    divisor  ()      of scales that have a parent; None for the weight's own
    """
    w, _ = numerics.in_parts(w, scheme, divisor)
    search = search_pairs if scheme.weights.blocks else _search_rows
    return torch.cat([search(some, scheme, scale_dtype, theirs) for some, theirs in pieces_of(w, scheme, moments)], -2)


def _search_rows(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor | None) -> Tensor:
    best = torch.full(scheme.sides(*w.shape), torch.inf, device=w.device)
    chosen, ends = torch.ones_like(best), numerics.ends_of(w, scheme)
    for shrink in shrinks_for(scheme):
        error = numerics.rounded_parts(w, scheme, scale_dtype, shrink, ends) - w
        by_row = numerics.grouped(error, scheme).square().sum(-1) if moments is None else group_losses(error, moments)
        loss = numerics.per_scale(by_row, scheme)
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better, shrink, chosen)
    return chosen
