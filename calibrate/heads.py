"""Finding where channels can be rotated: between a linear and the one reader of its outputs, by trying.

Attention's values can be rotated within their heads; what is multiplied channel by channel on its way (up and down
projections) cannot. Nothing here knows how large a head is: pairs of channels are tried first, then all sizes from the
largest, and what leaves the block's output alone is taken.
"""

import torch

from lowbit.calibrate.discover import Probe, Workbench, same
from lowbit.quant.site import Fold, Heads


@torch.no_grad()
def find_heads(bench: Workbench, folds: list[Fold], probe: Probe) -> list[Heads]:
    """Those of `folds` whose channels can be rotated, each with the largest heads that can."""
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
    """The ways to cut the channels of `fold` into heads of one even size, from the largest."""
    if not fold.is_linear or len(fold.columns) != 1:
        return []
    (columns,) = fold.columns.values()
    sizes = (size for size in range(len(columns), 1, -1) if size % 2 == 0 and len(columns) % size == 0)
    return [heads for size in sizes if (heads := _cut(fold, columns, size))]


def _cut(fold: Fold, columns: torch.Tensor, size: int) -> Heads | None:
    """Heads of `size` channels, where no two of them share a channel; several runs of columns may read one head."""
    channels = columns.view(-1, size).unique(dim=0)
    return Heads(fold, channels) if len(channels.unique()) == channels.numel() else None
