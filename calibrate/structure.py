"""Structure of a model's blocks: discovered once per kind of block, proved on each."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibrate.discover import Probe, Structure, Workbench, discover, prove
from lowbit.calibrate.heads import find_heads
from lowbit.models.skeleton import Block
from lowbit.models.states import States
from lowbit.models.walk import Walk
from lowbit.quant.site import Heads

PROBE_LENGTH = 24
SINGLE_PROBES = 48


class Prober:
    """Finds the structure of blocks, once for similar ones, and proves it on each block."""

    def __init__(self, walk: Walk, words: Tensor, seed: int) -> None:
        self._walk, self._seed = walk, seed
        self._known: dict[Any, tuple[Block, Structure]] = {}
        flat = words.flatten()
        flat = flat[torch.arange(2 * PROBE_LENGTH) % len(flat)]  # samples with images may hold few words
        probe, single = flat.view(2, -1), flat[:SINGLE_PROBES].view(-1, 1)
        self._entering = [walk.start([probe, single])]

    def structure(self, index: int) -> Structure:
        """The structure of block `index`, which must be loaded. Folds that fail on this block are listed as
        rejected."""
        block = self._walk.skeleton.blocks[index]
        bench = Workbench(block)
        probe, single = self._probes(index)
        key = block.signature()
        self._hand_on(bench, index)
        if key not in self._known:
            self._known[key] = block, discover(bench, probe, single, self._seed)
            return self._known[key][1]
        original, known = self._known[key]
        structure = known.renamed(original.names_in(block))
        proved = prove(bench, structure.folds, probe, self._seed + index)
        rejected = [fold.describe() for fold in structure.folds if fold not in proved]
        return replace(structure, folds=proved, rejected=rejected)

    def heads(self, index: int, structure: Structure) -> list[Heads]:
        """The folds of block `index`, which must be loaded, whose channels can also be rotated."""
        return find_heads(Workbench(self._walk.skeleton.blocks[index]), structure.folds, self._probes(index)[0])

    def learn(self, index: int) -> None:
        """Discover the structure of block `index`, loaded and unmodified, if it is the first of its kind."""
        block = self._walk.skeleton.blocks[index]
        if block.signature() not in self._known:
            self.structure(index)
        else:
            self._hand_on(Workbench(block), index)

    def _hand_on(self, bench: Workbench, index: int) -> None:
        """Run the probes through block `index`, if later blocks need more of it than hidden states."""
        if self._walk.wiring.carries and len(self._entering) == index + 1:
            probes = self._probe_states(index)
            self._entering.append([self._walk.run_module(bench.module, index, states) for states in probes])

    def _probes(self, index: int) -> tuple[Probe, Probe]:
        """Random hidden states as inputs of block `index`: two sequences, and many of one token."""
        probe, single = (self._probe(index, states) for states in self._probe_states(index))
        return probe, single

    def _probe_states(self, index: int) -> Iterator[States]:
        generator = torch.Generator().manual_seed(self._seed + index)
        for states in self._entering[index if self._walk.wiring.carries else 0]:
            hidden = torch.randn(states.hidden.shape, generator=generator)
            yield replace(states, hidden=hidden.to(states.hidden.device))

    def _probe(self, index: int, states: States) -> Probe:
        def run(module: nn.Module) -> Tensor:
            after = self._walk.run_module(module, index, states)
            # values that blocks leave for later blocks must not change either
            return torch.cat([(after.hidden - states.hidden).flatten(), *(left.flatten() for left in after.flow[1:])])

        return Probe(run)
