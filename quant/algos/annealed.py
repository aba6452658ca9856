"""Codes found by annealing: weights start as they are and harden into codes, while the others make up for each error.

Each weight has a position p on its number's grid, in units of its scale. The block computes with a soft weight,

    w = scale * (r + gap * h(u)),  r = the nearest code,  u = (p - r) / gap in [-1/2, 1/2],
    h(u) = sign(u) (1/2 + tanh(a (|u| - 1/2)) / (2 tanh(a / 2)))

less the group's minimum if it has one, where `gap` is the distance to the next code on the side of u. For a near 0, h
is the identity: nothing is rounded. For large a it is a step: everything is. In between the slope of h is small at
codes and large at borders, so a decided weight stays and an undecided one moves (soft rounding: Agustsson and Theis,
NeurIPS 2020). A position may travel to any code of its grid, which 2 and 3 bits need; learned rounding (learned.py)
reaches only the two nearest.

Gradients are exact, not straight-through. Steps are those of learned.py: by the slope over the curvature, in units of
its mean magnitude, clamped to [-1, 1].
"""

import math

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.algos.learned import LIMITS, bounded, by_linear, damped, linears_of
from lowbit.quant.qtensor import QTensor

SHARPNESS = (0.5, 100.0)  # a in the first and the last step
SCALE_SHARE = 0.25  # of a position's rate, for the multiplier of a scale


def sharpness(done: float) -> float:
    """The sharpness a after the fraction `done` of all steps: it grows by equal factors."""
    first, last = SHARPNESS
    return first * (last / first) ** done


class AnnealedWeight:
    """A weight (n, k) whose codes are annealed, or those of several linears, whose rows stand one behind the other.

    positions    (n, k) float32  in units of the scales, within the grid
    multipliers  (n, g) float32  of the first scales
    """

    def __init__(self, start: QTensor, wanted: Tensor, energy: Tensor | None = None) -> None:
        """`start`, `wanted` and `energy` as in LearnedWeight."""
        self._start, number = start, start.scheme.number
        self._energy = damped(torch.ones_like(wanted[0]) if energy is None else energy)
        zeros = self._zeros(wanted)
        self._low, self._high = (limit if zeros is None else limit - zeros for limit in (number.low, number.high))
        raised = numerics.raised(wanted, start.scheme, start.zeros)
        self.positions = self._inside(raised / numerics.per_weight(start.scales, start.scheme, wanted))
        self.multipliers = torch.ones_like(start.scales, dtype=torch.float32)

    def _zeros(self, like: Tensor) -> Tensor | None:
        """Codes of zero (n, k), None where the number's own zero is meant."""
        scheme, zeros = self._start.scheme, self._start.zeros
        return None if zeros is None or scheme.weights.minima else numerics.per_weight(zeros, scheme, like)

    def _inside(self, positions: Tensor) -> Tensor:
        low, high = (torch.as_tensor(limit).to(positions) for limit in (self._low, self._high))
        return torch.minimum(torch.maximum(positions, low), high)

    def rounded(self) -> QTensor:
        """The weight with every position rounded to its nearest code."""
        codes = self._start.scheme.number.encode(self.positions.clone(), self._zeros(self.positions))
        return self._start.iterate(self._scales(), codes)

    def shifted(self, weight: QTensor) -> Tensor:
        """The weight (n, k) that rounds to `weight`, the result of `rounded`, in parts."""
        return self._lowered(self.positions * numerics.per_weight(weight.scales, weight.scheme, self.positions))

    def _lowered(self, raised: Tensor) -> Tensor:
        """`raised` (n, k) less the minima of its groups, if they have any."""
        scheme, zeros = self._start.scheme, self._start.zeros
        if zeros is None or not scheme.weights.minima:
            return raised
        return raised - numerics.per_weight(zeros, scheme, raised)

    def _scales(self) -> Tensor:
        start = self._start
        return numerics.as_stored(start.scales.float() * self.multipliers, start.scheme, start.scales.dtype)

    def _soft_values(self, weight: QTensor, sharp: float) -> tuple[Tensor, Tensor]:
        """r + gap * h(u), and its slope by the position."""
        values = weight.values()
        away = self.positions - values
        gap = weight.scheme.number.gap(values, away)
        inner = away.abs().div_(gap).sub_(0.5).clamp_(max=0).mul_(sharp).tanh_()  # tanh(a (|u| - 1/2))
        whole = math.tanh(sharp / 2)
        slope = (1 - inner.square()).mul_(sharp / (2 * whole))
        return values + away.sign().mul_(gap).mul_(inner.div_(2 * whole).add_(0.5)), slope

    def computed(self, weight: QTensor, done: float) -> Tensor:
        """The soft weight (n, k) float32 after the fraction `done` of all steps; `weight` is the result of
        `rounded`."""
        soft, _ = self._soft_values(weight, sharpness(done))
        return self._lowered(soft * numerics.per_weight(weight.steps, weight.scheme, soft))

    def step(self, weight: QTensor, gradient: Tensor, rate: float, done: float) -> None:
        """One descent step of positions, each changed by at most `rate` local steps of the grid.

        weight    the result of `rounded`
        gradient  (n, k)  gradient of the loss with respect to the result of `computed`
        """
        scheme = weight.scheme
        scales = numerics.per_weight(weight.scales, scheme, self.positions)
        values, slope = self._soft_values(weight, sharpness(done))
        step = scheme.number.spacing(self.positions)
        gradient = gradient.float()
        by_position = gradient.mul(slope).div_(by_linear(scales * step, self._energy))
        count = linears_of(self._energy)
        by_scale = numerics.per_scale(numerics.grouped(values.mul_(gradient), scheme).sum(-1), scheme)
        self.positions = self._inside(self.positions.sub_(bounded(by_position, count) * step, alpha=rate))
        if scheme.number.coarse:
            by_range = by_scale * weight.scales.float()
            self.multipliers.sub_(bounded(by_range, count), alpha=rate * SCALE_SHARE).clamp_(*LIMITS)
