"""SmoothQuant: outliers move from activations, which int8 represents badly, into weights, which it represents well.

Dividing an input channel by s and multiplying its weights by s leaves the output unchanged. s balances the channel's
largest activation against its largest weight (Xiao et al., SmoothQuant, ICML 2023, equation 4).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.algos.awq import Losses

ALPHAS = tuple(step / 20 for step in range(6, 19))  # 0.3 to 0.9


@dataclass(frozen=True)
class SmoothChoice:
    """The winner of a search.

    scales  (channels,) float32; None if no migration won
    alpha   migration strength of the winner
    loss    loss of the winner; `unscaled_loss` is the loss without migration
    """

    scales: Tensor | None
    alpha: float
    loss: float
    unscaled_loss: float

    def as_json(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "loss": self.loss, "unscaled_loss": self.unscaled_loss}


def smoothing_scales(alpha: float, activation: Tensor, weight: Tensor) -> Tensor:
    """s = activation^alpha / weight^(1 - alpha), float32 (..., channels).

    activation  (..., channels)  max |x|
    weight      (..., channels)  max |w| over the consumers' rows

    A channel that never fired, or whose weights are all zero, keeps scale 1.
    """
    scales = activation.clamp(min=1e-5) ** alpha / weight.clamp(min=1e-5) ** (1 - alpha)
    sane = (activation > 0) & (weight > 0) & torch.isfinite(scales)
    return torch.where(sane, scales.clamp(min=1e-4, max=1e4), torch.ones_like(scales))


def search_alpha(
    activation: Tensor, weight: Tensor, losses_of: Losses, fixed: float | None = None
) -> list[SmoothChoice]:
    """The migration strength with the least loss at each of f folds. No migration (None) wins ties.

    activation, weight  (f, channels)  as in `smoothing_scales`
    losses_of           the losses of candidates, each with scales for all folds
    fixed               use this strength without a search
    """
    alphas = ALPHAS if fixed is None else (fixed,)
    candidates = [smoothing_scales(alpha, activation, weight) for alpha in alphas]
    unscaled, *losses = losses_of([None, *candidates])
    best = [SmoothChoice(None, 0.0, loss, loss) for loss in unscaled]
    for alpha, scales, row in zip(alphas, candidates, losses, strict=True):
        for fold, loss in enumerate(row):
            if fixed is not None or loss < best[fold].loss:
                best[fold] = SmoothChoice(scales[fold], alpha, loss, unscaled[fold])
    return best
