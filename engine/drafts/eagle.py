"""EAGLE-3 heads: one layer that continues the model's own features, in the layout in which such heads are published.

A head reads a token together with a feature of the position before it. The feature comes from three layers of the
model (low, middle, high), or from the head itself for tokens that it proposed.

Source: Li et al., EAGLE-3 (2025).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture, Names
from lowbit.engine.cache import Cache
from lowbit.engine.drafts.heads import MOST, Continued, Model
from lowbit.engine.layers import Block, build_block, planned
from lowbit.engine.products import Hidden, Norm, Product
from lowbit.engine.step import Step, Turns, turns_of
from lowbit.engine.weights import CheckpointReader, LayerParts
from lowbit.errors import CheckpointError
from lowbit.quant.kernels.packed import TILE_ROWS
from lowbit.quant.kernels.weight import Hints, Linear

LAYERS = ("midlayer.", "layers.0.")  # prefixes of the layer: of the method's authors, and of speculators
# Switches of variants that compute something else, with the only value that is computed here.
VARIANTS: Mapping[str, Any] = {"fc_norm": False, "norm_output": False, "parallel_drafting": False}


@dataclass(frozen=True)
class Eagle(Continued):
    """A head.

    taps      layers of the model whose outputs are a feature
    fuse      (hidden, taps * hidden of the model)
    norms     of embeddings and of features
    head      (draft vocabulary, hidden), with its norm
    targets   (draft vocabulary) int64: the model's token for each of the head's
    normed    True: the residual is the normed feature
    """

    architecture: Architecture
    taps: tuple[int, ...]
    embedding: Tensor
    fuse: Linear
    norms: tuple[Norm, Norm]
    block: Block
    head: Product
    targets: Tensor
    turns: Turns
    normed: bool = False
    most: int = MOST

    def features(self, taken: Tensor) -> Tensor:
        """The features (m, hidden) of the model's layer outputs (m, taps * hidden)."""
        return Product(self.fuse)(taken.contiguous())

    def planned(self) -> "Eagle":
        """See Head."""
        [block], head = planned((self.block,), self.head, dependent=True, shared=True)
        fuse = replace(self.fuse, hints=Hints(True, block.attention.qkv.weight.bulk))
        return replace(self, fuse=fuse, block=block, head=head)

    def forward(self, features: Tensor, step: Step, cache: Cache) -> Hidden:
        """The features (m, hidden) of the next positions. Writes the rows' keys and values to the cache."""
        known, seen = self.normed_pairs(self.norms, features, step)
        attention = self.block.attention
        q = attention.heads(Hidden(torch.cat([known, seen], -1)), step, self.turns, cache.layers[0])
        h = attention.o.onto(seen if self.normed else features, attention.attend(q, step, cache))
        return self.block.feed_forward(h, h.h)


class EagleParts(LayerParts):
    """The parts of a head's layer, whose first product reads an embedding and a feature, each with its norm."""

    def __init__(self, reader: CheckpointReader) -> None:
        super().__init__(reader, 0)

    def linear(self, part: str, n: int, k: int, pair_block: int = TILE_ROWS) -> Linear:
        """See LayerParts."""
        return super().linear(part, n, 2 * k if part == "qkv" else k, pair_block)

    def norm(self, part: str) -> Norm | None:
        """See LayerParts."""
        return None if part == "attention_norm" else super().norm(part)


def eagle_names(held: Mapping[str, Any]) -> Names:
    """The names of a head's tensors."""
    layer = next((prefix for prefix in LAYERS if f"{prefix}hidden_norm.weight" in held), LAYERS[0])
    return Names("embed_tokens", layer=layer, norm="norm")


def eagle_taps(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers of the model, from 0, whose outputs make a feature.

    A configuration counts the layers before which it takes them, so that 0 are the embeddings. Without a word they are
    the third, the middle and the third last.
    """
    nested = config.get("eagle_config") or {}
    named = config.get("eagle_aux_hidden_state_layer_ids", nested.get("eagle_aux_hidden_state_layer_ids"))
    found = named or (2, layers // 2, layers - 3)
    return tuple(layer - 1 for layer in found)


def load_eagle(reader: CheckpointReader, config: Mapping[str, Any], taps: tuple[int, ...], model: Model) -> Eagle:
    """The head in the files of `reader`. CheckpointError if a tensor is missing, left over, or has a wrong shape."""
    a, settings = reader.architecture, reader.settings
    for name, value in VARIANTS.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"{reader.directory}: {name} is {config[name]!r}; the engine computes only {value!r}")
    embedding = reader.optional("embed_tokens.weight", (a.vocabulary, a.hidden))
    fuse = reader.linear(("fc",), a.hidden, len(taps) * model.architecture.hidden, TILE_ROWS, biased=False)
    parts = EagleParts(reader)
    norms = reader.norm(f"{parts.prefix}input_layernorm"), reader.norm(f"{parts.prefix}hidden_norm")
    block = build_block(parts, a, 0, fused_append=True)
    count = int(config.get("draft_vocab_size") or a.vocabulary)
    head = Product(reader.linear(("lm_head",), count, a.hidden, TILE_ROWS), reader.norm("norm"), float32_out=True)
    return Eagle(
        a,
        taps,
        model.embedding if embedding is None else embedding,
        fuse,
        norms,
        block,
        head,
        targets_of(reader, count),
        turns_of(a.layers[0].rope, a.head_dim, model.positions, settings.device),
        bool(config.get("norm_before_residual", False)),
    )


def targets_of(reader: CheckpointReader, count: int) -> Tensor:
    """The model's token for each of the head's `count`: its own number plus the file's d2t.

    CheckpointError for tokens outside the vocabulary, or the same one twice.
    """
    vocabulary, own = reader.architecture.vocabulary, torch.arange(count, device=reader.settings.device)
    reader.left.discard("t2d")
    if reader.found("d2t") is None:
        targets = own
    else:
        found = reader.require("d2t")
        targets = own + reader.shaped(found, reader.tensors.read(found), (count,)).to(torch.int64)
    if int(targets.min()) < 0 or int(targets.max()) >= vocabulary or len(targets.unique()) < count:
        raise CheckpointError(
            f"{reader.directory}: d2t leads {count} tokens to {int(targets.min())} .. {int(targets.max())}, "
            f"{len(targets.unique())} of them different; the model has 0 .. {vocabulary - 1}: the drafter is damaged, "
            "or another model's"
        )
    return targets
