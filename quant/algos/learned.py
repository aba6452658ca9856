"""Learned rounding: gradient descent on rounding directions and scales, for the least output error.

Each weight has an offset v, in steps of its number's grid, added before rounding. Each group has a multiplier of its
scale:

    code = clamp(round(w / scale + v step) + zero),  rounded = (code - zero) * scale,  scale = multiplier * first scale

In the backward pass rounding counts as the identity (straight-through; Cheng et al., SignRound, EMNLP 2024). SignRound
steps by the sign of the gradient. Here a step is the gradient over its mean magnitude, clamped to [-1, 1]: the sign
where a gradient is large, and a small step where it is small. With signs, every weight ends up hovering around the
point where its code flips, even if that does not matter. After 20 steps on blocks 4 and 14 of the demo model, on
held-out windows, 0.58 and 0.55 of nearest rounding's error are left; signs (1 / iterations, falling to 0) leave 0.69
and 0.72.

The gradient by an offset is divided by the curvature of the error, which goes with the square of a step and with the
energy of the input. On block 2 of the demo model (groups of 64, 20 steps of 1024 tokens) 0.60 and 0.68 of nearest
rounding's error are left on held-out WikiText-2 and documentation with that, 0.69 and 0.80 without.

Scales of 8-bit floats are not learned: the step of a float follows the weight, so a moving scale changes codes at
random. On a toy layer (64 inputs, fp8) offsets alone leave 0.78 of nearest rounding's error, offsets with scales 0.96.
Nor are scales of few bits (NVFP4, MXFP4): one moves by a step of 6 to 12%, and rounds all codes of its group anew. With
scales that moved, `best` of the demo model in NVFP4 had twice the divergence (0.092 and 0.049 on WikiText-2).

The model computes with the rounded weight as an ordinary parameter; its gradient is passed in here, so that
quantization needs no autograd.
"""

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

OFFSET_LIMIT = 0.5
DAMPING = 0.01  # fraction of the mean energy added to each input's
LIMITS = (0.5, 1.5)  # of multipliers


class LearnedWeight:
    """A weight (n, k) under learned rounding, or those of several linears, whose rows stand one behind the other.

    offsets      (n, k) float32  added to w / scale before rounding, in steps of the grid
    multipliers  (n, g) float32  of the first scales
    """

    def __init__(self, start: QTensor, wanted: Tensor, energy: Tensor | None = None) -> None:
        """
        start   the first iterate, whose zeros stay
        wanted  (n, k)  the weight that `start` rounds, in parts (numerics.in_parts): the weight itself, or one with
                errors compensated (GPTQ)
        energy  (k,) float32  mean square of each input, of several linears (e, k); None if it is not known
        """
        self._start, self._wanted = start, wanted
        self._energy = damped(torch.ones_like(wanted[0]) if energy is None else energy)
        self.offsets = torch.zeros_like(wanted)
        self.multipliers = torch.ones_like(start.scales, dtype=torch.float32)

    def rounded(self) -> QTensor:
        """The weight rounded with the current offsets and multipliers."""
        start, scheme = self._start, self._start.scheme
        scales = numerics.as_stored(start.scales.float() * self.multipliers, scheme, start.scales.dtype)
        codes = numerics.quantize(self._shifted(scales), scheme, scales, start.zeros)
        return start.iterate(scales, codes)

    def shifted(self, weight: QTensor) -> Tensor:
        """The weight (n, k) that rounds to `weight`, the result of `rounded`: w + v step * scale, in parts."""
        return self._shifted(weight.scales)

    def _shifted(self, scales: Tensor) -> Tensor:
        steps = numerics.step_sizes(self._wanted, self._start.scheme, scales)
        return torch.addcmul(self._wanted, self.offsets, steps)

    def computed(self, weight: QTensor, done: float) -> Tensor:
        """The weight (n, k) that the model computes with in a step: `weight`, the result of `rounded`.

        done  fraction of all steps so far; of no effect here
        """
        return weight.dequantize()

    def step(self, weight: QTensor, gradient: Tensor, rate: float, done: float = 0.0) -> None:
        """One descent step of offsets and multipliers, each changed by at most `rate`.

        weight    the result of `rounded` that the model computed with
        gradient  (n, k)  gradient of the loss with respect to the rounded weight
        """
        gradient, scheme = gradient.float(), weight.scheme
        scales = numerics.per_weight(weight.scales, scheme, self._wanted)
        plain, values = numerics.raised(self._wanted, scheme, weight.zeros) / scales, weight.values()
        number = scheme.number
        step = number.spacing(plain)
        shifted = torch.add(plain, self.offsets * step)
        # a code clamped by the limits depends on the range alone; its offset has no effect
        free = (shifted - values).abs_() <= number.spacing(shifted) * (0.5 + 1e-4)
        # the slope over the curvature, both in steps: large steps of a float do not outweigh its small ones, nor large
        # inputs small ones
        by_offset = gradient.mul(free).div_(by_linear(scales * step, self._energy))
        count = linears_of(self._energy)
        self.offsets.sub_(bounded(by_offset, count), alpha=rate).clamp_(-OFFSET_LIMIT, OFFSET_LIMIT)
        if not scales_move(scheme):
            return
        by_scale = torch.where(free, values - plain, values).mul_(gradient)
        by_range = numerics.per_scale(numerics.grouped(by_scale, scheme).sum(-1), scheme) * weight.scales.float()
        self.multipliers.sub_(bounded(by_range, count), alpha=rate).clamp_(*LIMITS)


def scales_move(scheme: Scheme) -> bool:
    """True if scales are learned: floats that may move by little, of codes that do not follow them."""
    side = scheme.weights
    return (side.number.is_integer or side.number.coarse) and (side.scales is None or side.span > 0)


def linears_of(energy: Tensor) -> int:
    """The number of linears that have this `energy`, (k,) or (e, k)."""
    return energy.numel() // energy.shape[-1]


def by_linear(weights: Tensor, energy: Tensor) -> Tensor:
    """`weights` (n, k) times the `energy` of each one's linear, in place."""
    weights.view(linears_of(energy), -1, weights.shape[-1]).mul_(energy.view(-1, 1, energy.shape[-1]))
    return weights


def bounded(gradient: Tensor, linears: int = 1) -> Tensor:
    """`gradient` over its mean magnitude in each of so many linears, clamped to [-1, 1]; zeros stay zero."""
    parts = gradient.reshape(linears, -1)
    size = parts.abs().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (parts / size).clamp_(-1, 1).view_as(gradient)


def damped(energy: Tensor) -> Tensor:
    """The `energy` (k,) or (e, k) of inputs with a share of its mean added to each, so that none is 0."""
    return energy + DAMPING * energy.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
