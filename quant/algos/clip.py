"""Clipping search: the fraction of each group's range with the least error in the linear's output.

A group contributes x_g . (q - w)_g to the output error, so its expected squared error is (q - w)_g^T M_g (q - w)_g with
M_g the second moment of the group's inputs. No activations are kept in memory, and every token counts. (AWQ's own
clipping measures the same error on a sample of tokens.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.scheme import Scheme

SHRINKS = tuple(1 - step / 40 for step in range(25))  # 1 down to 0.4
CHUNK_ELEMENTS = 1 << 22  # weights handled at once


def group_moments(second_moment: Tensor, scheme: Scheme) -> Tensor:
    """The diagonal blocks (g, group_size, group_size) of a second moment (k, k)."""
    g = scheme.groups(second_moment.shape[0])
    size = second_moment.shape[0] // g
    return second_moment.view(g, size, g, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def diagonal_moments(second_moment: Tensor, scheme: Scheme) -> Tensor:
    """group_moments with off-diagonal entries set to zero: inputs weighted one by one, for rounding that corrects
    itself."""
    return torch.diag_embed(group_moments(second_moment, scheme).diagonal(dim1=1, dim2=2)).contiguous()


def group_losses(error: Tensor, moments: Tensor) -> Tensor:
    """Squared output error (n, g) of a weight error (n, k) per group, without cross terms between groups."""
    g, size, _ = moments.shape
    parts = error.view(-1, g, size).transpose(0, 1)
    return (torch.bmm(parts, moments) * parts).sum(-1).T


def search_shrink(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor, shrinks: Sequence[float] = SHRINKS
) -> Tensor:
    """The fraction (n, g) of each group's range with the least output error.

    w        (n, k)  float
    moments  (g, group_size, group_size) float32, from group_moments
    """
    rows = max(CHUNK_ELEMENTS // w.shape[1], 1)
    return torch.cat([_search_rows(part, scheme, scale_dtype, moments, shrinks) for part in w.float().split(rows)])


def _search_rows(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor, shrinks: Sequence[float]
) -> Tensor:
    best = torch.full((w.shape[0], moments.shape[0]), torch.inf, device=w.device)
    chosen = torch.ones_like(best)
    for shrink in shrinks:
        loss = group_losses(numerics.fake_quantize(w, scheme, scale_dtype, shrink) - w, moments)
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better, shrink, chosen)
    return chosen
