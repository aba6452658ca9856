"""The structure of a model's blocks: found once for all blocks alike, proved on each."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibrate.discover import Probe, Structure, Workbench, discover, prove
from lowbit.calibrate.heads import find_heads
from lowbit.models.skeleton import Block
from lowbit.models.walk import Walk
from lowbit.quant.site import Heads

PROBE_LENGTH = 24
SINGLE_PROBES = 48


class Prober:
    """Finds the structure of blocks, once for all blocks alike, and proves it on each."""

    def __init__(self, walk: Walk, ids: Tensor, seed: int) -> None:
        self._walk, self._seed = walk, seed
        self._known: dict[Any, tuple[Block, Structure]] = {}
        flat = ids.flatten()
        probe = flat[: PROBE_LENGTH * 2].view(2, -1)
        single = flat[:SINGLE_PROBES].view(-1, 1)
        self._shapes = [tuple(states.shape) for states in walk.start([probe, single])]

    def structure(self, index: int) -> Structure:
        """The structure of block `index`, which must be loaded; folds that fail on this block are named as rejected."""
        block = self._walk.skeleton.blocks[index]
        bench = Workbench(block)
        probe, single = self._probes(index)
        key = block.signature()
        if key not in self._known:
            self._known[key] = block, discover(bench, probe, single, self._seed)
            return self._known[key][1]
        original, known = self._known[key]
        structure = known.renamed(original.names_in(block))
        proved = prove(bench, structure.folds, probe, self._seed + index)
        rejected = [fold.describe() for fold in structure.folds if fold not in proved]
        return replace(structure, folds=proved, rejected=rejected)

    def heads(self, index: int, structure: Structure) -> list[Heads]:
        """The folds of block `index`, which must be loaded, whose channels can be rotated too."""
        return find_heads(Workbench(self._walk.skeleton.blocks[index]), structure.folds, self._probes(index)[0])

    def learn(self, index: int) -> None:
        """Find the structure of block `index`, loaded and as in the file, if it is the first of its kind."""
        if self._walk.skeleton.blocks[index].signature() not in self._known:
            self.structure(index)

    def _probes(self, index: int) -> tuple[Probe, Probe]:
        """Random hidden states that enter block `index`: two sequences, and many of one token."""
        device = next(self._walk.skeleton.blocks[index].module.parameters()).device
        generator = torch.Generator().manual_seed(self._seed + index)
        probe, single = (
            self._probe(index, torch.randn(shape, generator=generator).to(device)) for shape in self._shapes
        )
        return probe, single

    def _probe(self, index: int, hidden: Tensor) -> Probe:
        def run(module: nn.Module) -> Tensor:
            return self._walk.run_module(module, index, hidden) - hidden

        return Probe(run)
