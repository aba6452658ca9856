"""The decoder: the forward pass of every family, for prompts and decode steps alike.

A step takes m rows, each a token of some sequence at some position. Everything but attention treats rows independently.
Positions are in the step's tensors, so that one captured graph serves every position.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Architecture
from lowbit.engine.cache import Cache
from lowbit.engine.layers import Block, planned
from lowbit.engine.products import Hidden
from lowbit.engine.step import Step, Turns, turns_of
from lowbit.engine.weights import Weights


class Decoder:
    """A model's weights and its forward pass. It is immutable after construction, except for `plan`; caches are passed
    in."""

    def __init__(self, architecture: Architecture, weights: Weights, context: int, taps: Collection[int] = ()) -> None:
        """`taps` are layers, from 0, whose outputs a cache with features keeps of each position."""
        self.architecture, self.context, self.taps = architecture, context, tuple(sorted(taps))
        # layers share ropes: one table per rope
        tables: dict[tuple[int, int], Turns] = {}
        keys = [(id(layer.rope), architecture.heads_of(i).head_dim) for i, layer in enumerate(architecture.layers)]
        for layer, key in zip(architecture.layers, keys, strict=True):
            if key not in tables:
                tables[key] = turns_of(layer.rope, key[1], context, weights.device)
        self.turns = [tables[key] for key in keys]
        short = architecture.short
        # sequences longer than this use other rotations (longrope); None if no sequence within the context does
        self.short = short if short is not None and short < context else None
        # programmatic dependent launches, for captured graphs; ignored on a CPU
        self.dependent = weights.device.type == "cuda"
        layers, head = planned(weights.layers, weights.head, self.dependent, shared=False)
        self.weights = replace(weights, layers=layers, head=head)
        self.plan(self.dependent)

    def plan(self, deferring: bool) -> None:
        """Plan the layers of decode steps. `deferring` True fuses norms into the products around them.

        Fusing norms into products saves kernel launches on a GPU; on a CPU it is pure overhead.
        """
        self.blocks, _ = planned(self.weights.layers, self.weights.head, self.dependent, deferring)

    @property
    def taps_last(self) -> bool:
        """True if a cache with features keeps the last layer's outputs, so that those of all rows are wanted."""
        return len(self.architecture.layers) - 1 in self.taps

    def hidden(self, step: Step, cache: Cache) -> Hidden:
        """The last layer's output (m, hidden), of the wanted rows. Also writes keys, values and features of all rows to
        the cache."""
        for x in self.layers(step, cache):
            last = x
        return last

    def layers(self, step: Step, cache: Cache) -> Iterator[Hidden]:
        """The output (m, hidden) of each layer in turn."""
        x = Hidden(self.embed(step))
        blocks = self.blocks if step.prefix is None else self.weights.layers
        inputs = None if self.weights.token_inputs is None else self.weights.token_inputs(step.tokens, x.h)
        taken = []
        for index, (block, turns) in enumerate(zip(blocks, self.turns, strict=True)):
            x = self.layer(x, block, step, turns, cache)
            if inputs is not None and block.token_input is not None:
                x = block.token_input(x, block.attention.wanted(inputs[:, index], step))
            if index in self.taps:
                taken.append(x.h)
            yield x
        if cache.features is not None:
            cache.features[step.slots] = torch.cat(taken, -1)

    def layer(self, x: Hidden, block: Block, step: Step, turns: Turns, cache: Cache) -> Hidden:
        """One layer's output (m, hidden), in the last layer of the wanted rows."""
        h = block.attention(x, step, turns, cache)
        if not self.architecture.parallel:
            return block.feed_forward(h, h.h)
        return block.feed_forward(x if step.wanted is None else Hidden(block.attention.wanted(x.h, step)), h.h)

    def turns_at(self, positions: Tensor, lengths: Tensor | int) -> Tensor:
        """Indices (m) into the rope tables for rows at `positions` (m) of sequences of `lengths` (m, or one for
        all)."""
        if self.short is None:
            return positions
        return positions + self.context * (lengths > self.short)

    def step(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Step:
        """A decode step: each row is the last position of its sequence."""
        turns = self.turns_at(positions, positions + 1)
        return Step(tokens, positions, turns, starts, starts + positions, alone=True)

    def embed(self, step: Step) -> Tensor:
        """The rows' embeddings (m, hidden)."""
        x = functional.embedding(step.tokens, self.weights.embedding)
        if self.architecture.embedding_scale != 1.0:
            x = x * torch.tensor(self.architecture.embedding_scale, dtype=x.dtype).item()
        if self.weights.positions is not None:
            x = x + functional.embedding(step.positions, self.weights.positions)
        return x

    def logits(self, hidden: Tensor | Hidden) -> Tensor:
        """The logits (m, vocabulary) float32 for rows of the last layer's output (m, hidden)."""
        logits, cap = self.weights.head(hidden), self.architecture.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
