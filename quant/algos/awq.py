"""Activation-aware weight quantization (AWQ): candidate scales to move from activations into weights.

Channels with large activations deserve finer weights. Scaling a channel's weights up by s before rounding, and its
activations down by s, gives them a finer grid. One exponent sets the strength (Lin et al., AWQ, MLSys 2024, section
3.2). The candidates are the published ones, with and without the weight's own magnitude ("duo scaling"), and no
scaling. The caller measures the loss of each with the rounding that will be exported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.numerics import grouped
from lowbit.quant.scheme import Scheme

GRID = 20


@dataclass(frozen=True)
class ScaleChoice:
    """The winner of a search.

    scales     (channels,) float32, geometric centre 1; None if no scaling won
    ratio, duo  exponent and family of the winner
    loss       loss of the winner; `unscaled_loss` is the loss without scaling
    """

    scales: Tensor | None
    ratio: float
    duo: bool
    loss: float
    unscaled_loss: float

    def as_json(self) -> dict[str, float | bool]:
        return {"ratio": self.ratio, "duo": self.duo, "loss": self.loss, "unscaled_loss": self.unscaled_loss}


def weight_magnitude(w: Tensor, scheme: Scheme) -> Tensor:
    """Relative size of each input's weights: mean over rows of |w| / max |w| of its group, (k,)."""
    values = grouped(w.float().abs(), scheme)
    return (values / values.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0)


def scales_at(ratio: float, duo: bool, activation: Tensor, weight: Tensor) -> Tensor:
    """The scales (channels,) of one candidate.

    activation  (channels,)  mean |x|
    weight      (channels,)  weight_magnitude, reduced to channels

    plain  s = activation^ratio
    duo    s = activation^ratio / (weight^(1 - ratio) + 1e-4)
    """
    powered = activation.clamp(min=1e-6) ** ratio
    return _centred(powered / (weight ** (1 - ratio) + 1e-4) if duo else powered)


def _centred(scales: Tensor) -> Tensor:
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(torch.isfinite(scales) & (scales > 0), scales, torch.ones_like(scales))


def search_scales(
    activation: Tensor, weight: Tensor, losses_of: Callable[[Sequence[Tensor | None]], list[float]]
) -> ScaleChoice:
    """The candidate with the least loss. No scaling (None) wins ties.

    Both families are tried at every second point of the grid, then at the two neighbours of the best point. The loss is
    smooth in the ratio, so this finds the optimum of the full grid in half the time.
    """
    (unscaled,) = losses_of([None])

    def best_of(points: list[tuple[int, bool]], best: ScaleChoice) -> ScaleChoice:
        candidates = [scales_at(step / GRID, duo, activation, weight) for step, duo in points]
        for (step, duo), scales, loss in zip(points, candidates, losses_of(candidates), strict=True):
            if loss < best.loss:
                best = ScaleChoice(scales, step / GRID, duo, loss, unscaled)
        return best

    # plain scaling by ratio 0 is no scaling; duo scaling by ratio 1 is plain scaling
    grid = [(step, False) for step in range(2, GRID + 1, 2)] + [(step, True) for step in range(0, GRID, 2)]
    best = best_of(grid, ScaleChoice(None, 0.0, False, unscaled, unscaled))
    if best.scales is None:
        return best
    middle = round(best.ratio * GRID)
    return best_of([(step, best.duo) for step in (middle - 1, middle + 1) if 0 <= step <= GRID], best)
