"""Activation-aware weight quantization (AWQ): candidate scales to move from activations into weights.

Channels with large activations deserve finer weights. Scaling a channel's weights up by s before rounding, and its
activations down by s, gives them a finer grid. One exponent sets the strength (Lin et al., AWQ, MLSys 2024, section
3.2). The candidates are the published ones, with and without the weight's own magnitude ("duo scaling"), and no
scaling. The caller measures the loss of each with the rounding that will be exported.

Folds of one kind, those inside experts, are searched together: a single one is a batch of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

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
    """The scales (..., channels) of one candidate.

    activation  (..., channels)  mean |x|
    weight      (..., channels)  weight_magnitude, reduced to channels

    plain  s = activation^ratio
    duo    s = activation^ratio / (weight^(1 - ratio) + 1e-4)
    """
    powered = activation.clamp(min=1e-6) ** ratio
    return _centred(powered / (weight ** (1 - ratio) + 1e-4) if duo else powered)


def _centred(scales: Tensor) -> Tensor:
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.amax(-1, keepdim=True) * scales.amin(-1, keepdim=True)).sqrt()
    return torch.where(torch.isfinite(scales) & (scales > 0), scales, torch.ones_like(scales))


Losses = Callable[[Sequence[Tensor | None]], list[list[float]]]  # candidates (f, channels) -> the loss at each fold
Point = tuple[int, bool]  # step of the grid, duo


def search_scales(activation: Tensor, weight: Tensor, losses_of: Losses) -> list[ScaleChoice]:
    """The candidate with the least loss at each of f folds. No scaling (None) wins ties.

    activation, weight  (f, channels)  as in `scales_at`
    losses_of           the losses of candidates, each with scales for all folds

    Both families are tried at every second point of the grid, then at the two neighbours of the best point. The loss is
    smooth in the ratio, so this finds the optimum of the full grid in half the time.
    """
    (unscaled,) = losses_of([None])
    best = [ScaleChoice(None, 0.0, False, loss, loss) for loss in unscaled]

    @cache
    def at(point: Point) -> Tensor:
        return scales_at(point[0] / GRID, point[1], activation, weight)

    def try_all(rounds: list[list[Point | None]]) -> None:
        """Points for each fold, several times; None for a fold to leave alone."""
        candidates = [
            torch.stack([torch.ones_like(weight[fold]) if point is None else at(point)[fold] for fold, point in row])
            for row in map(list, map(enumerate, rounds))
        ]
        for points, scales, losses in zip(rounds, candidates, losses_of(candidates), strict=True):
            for fold, (point, loss) in enumerate(zip(points, losses, strict=True)):
                if point is not None and loss < best[fold].loss:
                    best[fold] = ScaleChoice(scales[fold], point[0] / GRID, point[1], loss, unscaled[fold])

    # plain scaling by ratio 0 is no scaling; duo scaling by ratio 1 is plain scaling
    grid: list[Point] = [(step, False) for step in range(2, GRID + 1, 2)] + [(step, True) for step in range(0, GRID, 2)]
    try_all([[point] * len(best) for point in grid])
    middles = [(round(choice.ratio * GRID), choice.duo, choice.scales is not None) for choice in best]
    beside = [
        [(middle + by, duo) if scaled and 0 <= middle + by <= GRID else None for middle, duo, scaled in middles]
        for by in (-1, 1)
    ]
    try_all([points for points in beside if any(points)])
    return best
