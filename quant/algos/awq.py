"""Activation-aware weight quantization: which scale to move from activations into weights.

Channels with large activations deserve finer weights. Scaling a channel's weights up by s before rounding, and its
activations down by s, gives it that; one exponent decides how far to go (Lin et al., AWQ, MLSys 2024, section 3.2).
The candidates here are the published family, with and without the weight's own magnitude ("duo scaling"), and no
scaling at all; the caller measures each with the rounding that will be exported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics import grouped
from quant.scheme import Scheme

GRID = 20


@dataclass(frozen=True)
class ScaleChoice:
    """The winner of a search.

    scales     (channels,) float32, geometric centre 1; None where no scaling won
    ratio, duo  the exponent and the family it came from
    loss       its loss; `unscaled_loss` is that of no scaling
    """

    scales: Tensor | None
    ratio: float
    duo: bool
    loss: float
    unscaled_loss: float

    def as_json(self) -> dict[str, float | bool]:
        return {"ratio": self.ratio, "duo": self.duo, "loss": self.loss, "unscaled_loss": self.unscaled_loss}


def weight_magnitude(w: Tensor, scheme: Scheme) -> Tensor:
    """How large each input's weights are within their groups: mean over rows of |w| / max |w| of the group, (k,)."""
    values = grouped(w.float().abs(), scheme)
    return (values / values.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0)


def candidates(activation: Tensor, weight: Tensor) -> Iterator[tuple[float, bool, Tensor]]:
    """Ratio, family and scales (channels,) to try.

    activation  (channels,)  mean |x|
    weight      (channels,)  weight_magnitude, brought to channels

    plain  s = activation^ratio
    duo    s = activation^ratio / (weight^(1 - ratio) + 1e-4)
    """
    for step in range(1, GRID + 1):
        ratio = step / GRID
        powered = activation.clamp(min=1e-6) ** ratio
        yield ratio, False, _centred(powered)
        if step < GRID:
            yield ratio, True, _centred(powered / (weight ** (1 - ratio) + 1e-4))


def _centred(scales: Tensor) -> Tensor:
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(torch.isfinite(scales) & (scales > 0), scales, torch.ones_like(scales))


def search_scales(activation: Tensor, weight: Tensor, loss_of: Callable[[Tensor | None], float]) -> ScaleChoice:
    """The candidate with the least loss; `loss_of(None)` is the loss without scaling, which wins ties."""
    unscaled = loss_of(None)
    best = ScaleChoice(None, 0.0, False, unscaled, unscaled)
    for ratio, duo, scales in candidates(activation, weight):
        loss = loss_of(scales)
        if loss < best.loss:
            best = ScaleChoice(scales, ratio, duo, loss, unscaled)
    return best
