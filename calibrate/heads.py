"""Discovery of channels that can be rotated, between a linear and the only reader of its outputs, by trial.

Attention values can be rotated within their heads. Channels that are multiplied elementwise on the way (up and down
projections) cannot. The head size is not known here: pairs of channels are tried first, then all sizes from the
largest. The first size that leaves the block's output unchanged wins.
"""

import torch

from lowbit.calibrate.discover import Probe, Workbench, same
from lowbit.quant.site import Fold, Heads


@torch.no_grad()
def find_heads(bench: Workbench, folds: list[Fold], probe: Probe) -> list[Heads]:
    """The `folds` whose channels can be rotated, each with the largest head size that works."""
    output = probe.run(bench.module)

    def holds(heads: Heads) -> bool:
        restore = bench.keep(heads.fold)
        bench.turn(heads)
        unchanged = same(output, probe.run(bench.module))
        restore()
        return unchanged

    found = []
    for fold in folds:
        cuts = _cuts(fold)
        if cuts and holds(cuts[-1]):
            found.append(next(filter(holds, cuts)))
    return found


def _cuts(fold: Fold) -> list[Heads]:
    """All ways to cut the channels of `fold` into heads of one even size, largest first."""
    if not fold.is_linear or len(fold.columns) != 1:
        return []
    (columns,) = fold.columns.values()
    sizes = (size for size in range(len(columns), 1, -1) if size % 2 == 0 and len(columns) % size == 0)
    return [heads for size in sizes if (heads := _cut(fold, columns, size))]


def _cut(fold: Fold, columns: torch.Tensor, size: int) -> Heads | None:
    """Heads of `size` channels, or None if two heads share a channel. Several runs of columns may read one head."""
    channels = columns.view(-1, size).unique(dim=0)
    return Heads(fold, channels) if len(channels.unique()) == channels.numel() else None
