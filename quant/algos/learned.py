"""Learned rounding: gradient descent on rounding directions and clipping ranges, for the least output error.

Each weight has an offset v in [-1/2, 1/2], in steps of its number's grid, added before rounding. Each group has a
multiplier of its range:

    code = clamp(round(w / scale + v step) + zero),  rounded = (code - zero) * scale,  scale = multiplier * range / span

In the backward pass rounding counts as the identity (straight-through; Cheng et al., SignRound, EMNLP 2024). SignRound
steps by the sign of the gradient. Here a step is the gradient over its mean magnitude, clamped to [-1, 1]: the sign
where a gradient is large, and a small step where it is small. With signs, every weight ends up hovering around the
point where its code flips, even if that does not matter. After 20 steps on blocks 4 and 14 of the demo model, on
held-out windows, 0.58 and 0.55 of nearest rounding's error are left; signs (1 / iterations, falling to 0) leave 0.69
and 0.72.

Ranges of floats are not learned: the step of a float follows the weight, so a moving range changes codes at random. On
a toy layer (64 inputs, fp8) offsets alone leave 0.78 of nearest rounding's error, offsets with ranges 0.96.
Scales of few bits are not learned either.

The model computes with the rounded weight as an ordinary parameter; its gradient is passed in here, so that
quantization needs no autograd.
"""

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

OFFSET_LIMIT = 0.5
SHRINK_LIMITS = (0.3, 1.1)


class LearnedWeight:
    """A weight (n, k) under learned rounding.

    offsets  (n, k) float32  added to w / scale before rounding, in steps of the grid
    shrink   (n, g) float32  multiplier of each group's range, as in numerics.choose_params
    """

    def __init__(
        self,
        w: Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        shrink: Tensor | float = 1.0,
        divisor: Tensor | None = None,
    ) -> None:
        self._w, self._divisor = numerics.in_parts(w, scheme, divisor)
        self._scheme, self._scale_dtype = scheme, scale_dtype
        self.offsets = torch.zeros_like(self._w)
        self.shrink = torch.ones(scheme.sides(*w.shape), device=w.device) * shrink

    def rounded(self) -> QTensor:
        """The weight rounded with the current offsets and multipliers."""
        scales, zeros = numerics.choose_params(self._w, self._scheme, self._scale_dtype, self.shrink)
        shifted = torch.addcmul(self._w, self.offsets, numerics.step_sizes(self._w, self._scheme, scales))
        codes = numerics.quantize(shifted, self._scheme, scales, zeros)
        return QTensor(codes, scales, zeros, self._scheme, divisor=self._divisor)

    def step(self, weight: QTensor, gradient: Tensor, rate: float) -> None:
        """One descent step of offsets and multipliers, each changed by at most `rate`.

        weight    the result of `rounded` that the model computed with
        gradient  (n, k)  gradient of the loss with respect to the rounded weight
        """
        gradient = gradient.float()
        scales = numerics.per_weight(weight.scales, self._scheme, self._w)
        plain, values, number = self._w / scales, weight.values(), self._scheme.number
        step = number.spacing(plain)
        shifted = torch.add(plain, self.offsets * step)
        # a code clamped by the limits depends on the range alone; its offset has no effect
        free = (shifted - values).abs_() <= number.spacing(shifted) * (0.5 + 1e-4)
        # divided by the squared step, the curvature of the loss: otherwise a float's large steps would outweigh small
        # ones
        by_offset = gradient.mul(scales).mul_(free).div_(step)
        self.offsets.sub_(_bounded(by_offset), alpha=rate).clamp_(-OFFSET_LIMIT, OFFSET_LIMIT)
        if not number.is_integer:
            return
        by_scale = torch.where(free, values - plain, values).mul_(gradient)
        by_range = numerics.grouped(by_scale, self._scheme).sum(-1) * weight.scales.float()
        self.shrink.sub_(_bounded(by_range), alpha=rate).clamp_(*SHRINK_LIMITS)


def _bounded(gradient: Tensor) -> Tensor:
    """`gradient` over its mean magnitude, clamped to [-1, 1]; zeros stay zero."""
    size = gradient.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (gradient / size).clamp_(-1, 1)
