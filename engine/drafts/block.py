"""Block drafters in DFlash's layout: a few layers that write a whole block of tokens in one pass.

The rows of a block are the last token and masks; each row attends to the whole block and, in every layer, to keys and
values of the model's features at all positions before. The embeddings and the head are the model's.

Source: Chen et al., DFlash (2026).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Architecture, Names
from lowbit.engine.cache import Cache
from lowbit.engine.drafts.heads import MOST, SPARE, Model, largest
from lowbit.engine.layers import Block, build_block, planned
from lowbit.engine.products import Hidden, Norm, Product
from lowbit.engine.step import Step, Turns, turns_of
from lowbit.engine.weights import CheckpointReader, LayerParts
from lowbit.errors import CheckpointError
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import TILE_ROWS
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.weight import Hints, Linear


@dataclass(frozen=True)
class BlockHead:
    """A drafter of blocks.

    taps   layers of the model whose outputs are a feature
    fuse   (hidden, taps * hidden of the model), and its norm
    head   the model's, with the drafter's norm
    size   rows of a block; `mask` is the token of those that are to be written
    """

    architecture: Architecture
    taps: tuple[int, ...]
    embedding: Tensor
    fuse: Linear
    norm: Norm
    blocks: tuple[Block, ...]
    head: Product
    turns: Turns
    size: int
    mask: int

    @property
    def most(self) -> int:
        """Longest draft."""
        return min(self.size - 1, MOST)

    def planned(self) -> "BlockHead":
        """See Head."""
        blocks, head = planned(self.blocks, self.head, dependent=True, shared=True)
        fuse = replace(self.fuse, hints=Hints(True, blocks[0].attention.qkv.weight.bulk))
        return replace(self, fuse=fuse, blocks=blocks, head=head)

    def read(self, taken: Tensor, step: Step, cache: Cache) -> None:
        """See Head. The step's tokens do not matter: keys and values are those of features."""
        fused = Product(self.fuse)(taken.contiguous())
        features = Hidden(ops.normalize(self.norm.of(Rows(fused))))
        for block, kv in zip(self.blocks, cache.layers, strict=True):
            attention = replace(block.attention, qkv=Product(block.attention.qkv.linear))
            attention.heads(features, step, self.turns, kv)

    def draft(self, taken: Tensor, step: Step, last: Tensor, most: int, cache: Cache) -> Tensor:
        """See Head: one pass over all rows of the blocks, which write their keys and values behind the features."""
        self.read(taken, step, cache)
        count, masks = len(last), step.tokens.new_full((len(last), self.size - 1), self.mask)
        tokens = torch.cat([step.tokens[last].unsqueeze(1), masks], 1).flatten()
        places = step.positions[last].unsqueeze(1) + torch.arange(1, 1 + self.size, device=last.device)
        starts = step.starts[last].repeat_interleave(self.size)
        ends = places[:, -1].repeat_interleave(self.size)  # every row sees the whole block
        block = Step(tokens, ends, places.flatten(), starts, starts + places.flatten(), longest=step.longest)
        x = Hidden(functional.embedding(tokens, self.embedding))
        for layer in self.blocks:
            h = layer.attention(x, block, self.turns, cache)
            x = layer.feed_forward(h, h.h)
        rows = x.h.unflatten(0, (count, self.size))[:, 1 : 1 + most]
        return largest(self.head(rows.flatten(0, 1).contiguous())).view(count, most)


def block_names(held: Mapping[str, Any]) -> Names:
    """The names of a drafter's tensors."""
    return Names("embed_tokens", layer="layers.{}.", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", norm="norm")


def block_taps(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers of the model, from 0, whose outputs make a feature: those named, or as many as the drafter has, evenly
    from the second to the fourth last."""
    named = (config.get("dflash_config") or {}).get("target_layer_ids")
    if named:
        return tuple(named)
    count, last = int(config["num_hidden_layers"]), layers - 3
    return (layers // 2,) if count == 1 else tuple(round(1 + i * (last - 1) / (count - 1)) for i in range(count))


def load_block(reader: CheckpointReader, config: Mapping[str, Any], taps: tuple[int, ...], model: Model) -> BlockHead:
    """The drafter in the files of `reader`. CheckpointError if a tensor is missing, left over, or has a wrong shape."""
    a, settings = reader.architecture, reader.settings
    size, mask = config.get("block_size"), (config.get("dflash_config") or {}).get("mask_token_id")
    if type(size) is not int or not 2 <= size <= SPARE - 1 or type(mask) is not int or not 0 <= mask < a.vocabulary:
        raise CheckpointError(
            f"{reader.directory}: block_size is {size!r} and mask_token_id {mask!r}; a block has 2 to {SPARE - 1} "
            f"rows, tokens are 0 to {a.vocabulary - 1}"
        )
    if a.hidden != model.architecture.hidden or any(layer.window for layer in a.layers):
        raise CheckpointError(
            f"{reader.directory}: a drafter of blocks has the model's hidden size, {model.architecture.hidden}, not "
            f"{a.hidden}, and no windows"
        )
    return BlockHead(
        a,
        taps,
        model.embedding,
        reader.linear(("fc",), a.hidden, len(taps) * a.hidden, TILE_ROWS, biased=False),
        reader.norm("hidden_norm"),
        tuple(build_block(LayerParts(reader, i), a, i, fused_append=False) for i in range(len(a.layers))),
        Product(model.head.linear, reader.norm("norm"), float32_out=True),
        turns_of(a.layers[0].rope, a.head_dim, model.positions, settings.device),
        size,
        mask,
    )
