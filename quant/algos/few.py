"""Scales and zeros of weights of 2 and 3 bits, searched over the whole grid and then fitted to the codes.

With four or eight codes the best range lies far inside the weights, and which side has one code more matters. Each
group tries scales down to a fifth of its range, of both signs where scales may be negative, and all zeros. The error is
the output's, e^T M e with M the second moment of the group's inputs, as in clip.py. Then codes and scale are fitted to
each other in turn: for fixed codes q the best scale of weights w is w^T M q / q^T M q.
"""

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.algos.clip import group_losses, pieces_of, search_shrink
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme
from lowbit.quant.stats import weighed

MOST_BITS = 3
FRACTIONS = tuple(1 - step / 20 for step in range(17))  # of the range that covers all: 1 down to 0.2
FITS = 4


def few(scheme: Scheme) -> bool:
    """True if the scheme's weights are integers of so few bits that this search is worth its time; those of blocks
    have a search of their own (fit.py)."""
    return not scheme.weights.blocks and scheme.number.is_integer and scheme.bits <= MOST_BITS


def round_in_ranges(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor, divisor: Tensor | None = None
) -> QTensor:
    """`w` (n, k) rounded to the nearest codes of the ranges with the least output error: by this search for few bits,
    by clip.search_shrink otherwise. Arguments as there."""
    if few(scheme):
        return search_few(w, scheme, scale_dtype, moments)
    return round_to_nearest(w, scheme, scale_dtype, search_shrink(w, scheme, scale_dtype, moments, divisor), divisor)


def search_few(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor) -> QTensor:
    """`w` (n, k) rounded to the nearest codes of the scales and zeros with the least output error.

    moments  (g, group_size, group_size) float32, from clip.group_moments
    """
    pieces = pieces_of(w, scheme, moments)
    parts = [_search_rows(some.float(), scheme, scale_dtype, theirs) for some, theirs in pieces if theirs is not None]
    codes, scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    return QTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


def _search_rows(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor) -> tuple[Tensor, ...]:
    search = _Search(w, scheme, scale_dtype, moments)
    values, number = numerics.grouped(w, scheme), scheme.number
    top, bottom = values.amax(-1).clamp(min=0), values.amin(-1).clamp(max=0)
    for zero in [0] if scheme.symmetric else range(int(number.low), int(number.high) + 1):
        for high, low in ((top, bottom), (bottom, top)) if scheme.signed_scales else ((top, bottom),):
            above, below = number.high - zero, number.low - zero
            covering = _larger(high / above if above else None, low / below if below else None)
            for fraction in FRACTIONS:
                search.offer(covering * fraction, torch.full_like(covering, zero, dtype=torch.int32))
    for _ in range(FITS):
        search.offer(search.fitted(), search.zeros)
    return search.codes, search.scales, search.zeros


def _larger(one: Tensor | None, other: Tensor | None) -> Tensor:
    """The number of larger magnitude of each pair; at most one of both tensors is None."""
    if one is None or other is None:
        found = other if one is None else one
        assert found is not None
        return found
    return torch.where(one.abs() > other.abs(), one, other)


class _Search:
    """The best scales and zeros so far of some rows, group by group."""

    def __init__(self, w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, moments: Tensor) -> None:
        self._w, self._scheme, self._dtype, self._moments = w, scheme, scale_dtype, moments
        sides = scheme.sides(*w.shape)
        self._loss = torch.full(sides, torch.inf, device=w.device)
        self.scales = torch.ones(sides, dtype=scale_dtype, device=w.device)
        self.zeros = torch.zeros(sides, dtype=torch.int32, device=w.device)

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        """Keep `scales` (n, g) and `zeros` where they lose less."""
        scales = numerics.as_stored(scales, self._scheme, self._dtype)
        loss = group_losses(self._dequantized(scales, zeros) - self._w, self._moments)
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)

    @property
    def codes(self) -> Tensor:
        """The nearest codes of the best scales and zeros."""
        return self._codes(self.scales, self.zeros)

    def _codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        return numerics.quantize(self._w, self._scheme, scales, None if self._scheme.symmetric else zeros)

    def _dequantized(self, scales: Tensor, zeros: Tensor) -> Tensor:
        shown = None if self._scheme.symmetric else zeros
        return numerics.dequantize(self._codes(scales, zeros), self._scheme, scales, shown)

    def fitted(self) -> Tensor:
        """The best scales for the codes of the best so far, by least squares; theirs where all codes are zero."""
        values = self._dequantized(self.scales, self.zeros)
        values = values / numerics.per_weight(self.scales, self._scheme, values)
        q, w = (numerics.grouped(each, self._scheme) for each in (values, self._w))
        of_q = weighed(q, self._moments)
        own = (of_q * q).sum(-1)
        return torch.where(own > 0, (of_q * w).sum(-1) / own.clamp(min=1e-30), self.scales.float())
