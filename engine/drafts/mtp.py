"""Heads that a checkpoint carries behind its last layer, to predict one token more (multi-token prediction): those of
DeepSeek-V3 and R1, and of GLM-4.5.

Such a head is a layer of the model's own kind. It reads a token together with the model's normed output at the position
before, or with its own output there. Embeddings are the model's; it has a norm and a head of its own.

Source: DeepSeek-AI, DeepSeek-V3 Technical Report (2024).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture, Names
from lowbit.engine.cache import Cache
from lowbit.engine.drafts.heads import MOST, Continued, Model
from lowbit.engine.layers import Block, build_block, planned
from lowbit.engine.products import Hidden, Norm, Product
from lowbit.engine.step import Step, Turns, turns_of
from lowbit.engine.weights import CheckpointReader, LayerParts, Settings
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import Checkpoint
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import TILE_ROWS
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.weight import Hints, Linear

OWN = "mtp"  # the name of a drafter that the model's own checkpoint carries


@dataclass(frozen=True)
class TokenHead(Continued):
    """A head.

    taps    the model's last layer
    norms   of the model's output, of embeddings, and of features
    join    (hidden, 2 hidden): an embedding and a feature to the layer's input
    """

    architecture: Architecture
    taps: tuple[int, ...]
    embedding: Tensor
    norms: tuple[Norm, Norm, Norm]
    join: Linear
    block: Block
    head: Product
    targets: Tensor
    turns: Turns
    most: int = MOST

    def features(self, taken: Tensor) -> Tensor:
        """See Continued."""
        return ops.normalize(self.norms[0].of(Rows(taken.contiguous())))

    def planned(self) -> "TokenHead":
        """See Head."""
        [block], head = planned((self.block,), self.head, dependent=True, shared=True)
        join = replace(self.join, hints=Hints(True, block.attention.qkv.weight.bulk))
        return replace(self, join=join, block=block, head=head)

    def forward(self, features: Tensor, step: Step, cache: Cache) -> Hidden:
        """See Continued."""
        known, seen = self.normed_pairs(self.norms[1:], features, step)
        x = Hidden(Product(self.join)(torch.cat([known, seen], -1)))
        h = self.block.attention(x, step, self.turns, cache)
        return self.block.feed_forward(h, h.h)


def load_own(checkpoint: Checkpoint, names: Names, model: Model, settings: Settings) -> TokenHead:
    """The first head that a model's checkpoint carries. CheckpointError if there is none, or a tensor is missing."""
    whole = model.architecture
    count = len(whole.layers)
    prefix = names.layer.format(count)
    if f"{prefix}eh_proj.weight" not in checkpoint.entries:
        raise CheckpointError(
            f"{checkpoint.directory}: no {prefix}eh_proj.weight in its files: it carries no head that predicts more "
            "tokens; name the directory of a drafter"
        )
    a = replace(whole, layers=whole.layers[-1:])
    reader = CheckpointReader(checkpoint, replace(names, layer=prefix), a, settings)
    norm, head = f"{prefix}shared_head.norm", f"{prefix}shared_head.head"
    assert model.head.norm is not None
    linear = model.head.linear
    if reader.found(f"{head}.weight") is not None:
        linear = reader.linear((head,), a.vocabulary, a.hidden, TILE_ROWS)
    return TokenHead(
        a,
        (count - 1,),
        model.embedding,
        (model.head.norm, reader.norm(f"{prefix}enorm"), reader.norm(f"{prefix}hnorm")),
        reader.linear((f"{prefix}eh_proj",), a.hidden, 2 * a.hidden, TILE_ROWS, biased=False),
        build_block(LayerParts(reader, 0), a, 0, fused_append=False),
        Product(linear, reader.norm(norm), float32_out=True),
        torch.arange(a.vocabulary, device=settings.device),
        turns_of(a.layers[0].rope, a.head_dim, model.positions, settings.device),
    )
