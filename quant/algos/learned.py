"""Learned rounding: which way to round, and how much of each range to keep, by descent on an output's error.

Each weight has an offset v in [-1/2, 1/2], in steps of its number's grid, that is added before rounding; each group has
a multiplier of its range:

    code = clamp(round(w / scale + v step) + zero),  rounded = (code - zero) * scale,  scale = multiplier * range / span

On the way back rounding counts as the identity (straight-through; Cheng et al., SignRound, EMNLP 2024). SignRound steps
by the sign of the gradient. Here a step is the gradient in units of its mean magnitude, held within [-1, 1]: the sign
where a gradient is large, and little where it is small. Under the sign every weight ends up hovering where its code
flips, whether that matters or not. After 20 steps on blocks 4 and 14 of the demo model, on windows not learned from,
0.58 and 0.55 of nearest rounding's error are left, where signs (1 / iterations, falling to 0) leave 0.69 and 0.72.

Ranges of floats stay: their steps follow the weights, and a range that moves turns codes at random. On a toy layer (64
inputs, fp8) offsets alone leave 0.78 of nearest rounding's error, with ranges 0.96.

The model computes with the rounded weight as an ordinary parameter and its gradient comes in here, so that quantization
itself needs no tape.
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

    offsets  (n, k) float32  added to w / scale before rounding, in steps of the grid there
    shrink   (n, g) float32  multiplier of each group's range, as in numerics.choose_params
    """

    def __init__(self, w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0) -> None:
        self._w, self._scheme, self._scale_dtype = w.float(), scheme, scale_dtype
        self.offsets = torch.zeros_like(self._w)
        self.shrink = torch.ones(w.shape[0], scheme.groups(w.shape[1]), device=w.device) * shrink

    def rounded(self) -> QTensor:
        """The weight as it rounds now."""
        scales, zeros = numerics.choose_params(self._w, self._scheme, self._scale_dtype, self.shrink)
        shifted = torch.addcmul(self._w, self.offsets, numerics.step_sizes(self._w, self._scheme, scales))
        return QTensor(numerics.quantize(shifted, self._scheme, scales, zeros), scales, zeros, self._scheme)

    def step(self, weight: QTensor, gradient: Tensor, rate: float) -> None:
        """Move offsets and multipliers against their gradients, by at most `rate`.

        weight    what `rounded` returned, and the model computed with
        gradient  (n, k)  of the loss by the rounded weight
        """
        gradient = gradient.float()
        scales = numerics.per_weight(weight.scales, self._scheme, self._w)
        plain, values, number = self._w / scales, weight.values(), self._scheme.number
        step = number.spacing(plain)
        shifted = torch.add(plain, self.offsets * step)
        # a code that the limits hold back follows the range alone, and an offset would do nothing
        free = (shifted - values).abs_() <= number.spacing(shifted) * (0.5 + 1e-4)
        # over the step's square, which the loss bends by: a float's large steps would drown its small ones
        by_offset = gradient.mul(scales).mul_(free).div_(step)
        self.offsets.sub_(_bounded(by_offset), alpha=rate).clamp_(-OFFSET_LIMIT, OFFSET_LIMIT)
        if not number.is_integer:
            return
        by_scale = torch.where(free, values - plain, values).mul_(gradient)
        by_range = numerics.grouped(by_scale, self._scheme).sum(-1) * weight.scales.float()
        self.shrink.sub_(_bounded(by_range), alpha=rate).clamp_(*SHRINK_LIMITS)


def _bounded(gradient: Tensor) -> Tensor:
    """`gradient` over its mean magnitude, within [-1, 1]; zeros where it is zero."""
    size = gradient.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (gradient / size).clamp_(-1, 1)
