"""Heads that a checkpoint carries to predict one token more (multi-token prediction): those of DeepSeek-V3 and R1, of
GLM-4.5, and of MiMo.

Such a head is a layer of the model's own kind. It reads a token together with the model's normed output at the position
before, or with its own output there. Embeddings are the model's; it has a norm of its own, and may have an output head.

Source: DeepSeek-AI, DeepSeek-V3 Technical Report (2024); Xiaomi, MiMo (2025).
"""

from collections.abc import Collection
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
class Layout:
    """The names of a head's tensors.

    prefix     with {} for the number of the model's layers
    embedding, feature  norms
    join       the product of both: the embedding's inputs come first, or the feature's if `swapped`
    norm       behind the layer
    head       its output head, or None for the model's
    continued  True: a head goes on with its output behind the norm, False: with that before it
    """

    prefix: str
    embedding: str
    feature: str
    join: str
    norm: str
    head: str | None = None
    swapped: bool = False
    continued: bool = False

    def inputs(self, layers: int) -> str:
        """The product of embedding and feature, in a model of so many layers."""
        return f"{self.prefix.format(layers)}{self.join}"


LAYOUTS = (
    Layout("model.layers.{}.", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"),
    Layout(
        "model.mtp_layers.0.",
        "token_layernorm",
        "hidden_layernorm",
        "input_proj",
        "final_layernorm",
        swapped=True,
        continued=True,
    ),
)


@dataclass(frozen=True)
class TokenHead(Continued):
    """A head.

    taps    the model's last layer
    norms   of the model's output, of embeddings, and of features
    join    (hidden, 2 hidden): an embedding and a feature, or by turns if `swapped`, to the layer's input
    after   the norm of its output if it goes on behind it, or None; the head has the other
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
    swapped: bool = False
    after: Norm | None = None
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
        x = Hidden(Product(self.join)(torch.cat([seen, known] if self.swapped else [known, seen], -1)))
        h = self.block.attention(x, step, self.turns, cache)
        out = self.block.feed_forward(h, h.h)
        return out if self.after is None else Hidden(ops.normalize(self.after.of(Rows(out.h))))


def layout_of(held: Collection[str], layers: int, directory: object) -> Layout:
    """The layout of the head among these tensors of a model with so many layers. CheckpointError if there is none."""
    wanted = [layout.inputs(layers) for layout in LAYOUTS]
    found = next((layout for layout, name in zip(LAYOUTS, wanted, strict=True) if f"{name}.weight" in held), None)
    if found is None:
        raise CheckpointError(
            f"{directory}: no {'.weight or '.join(wanted)}.weight in its files: it carries no head that predicts more "
            "tokens; name the directory of a drafter"
        )
    return found


def load_own(checkpoint: Checkpoint, names: Names, model: Model, settings: Settings) -> TokenHead:
    """The first head that a model's checkpoint carries. CheckpointError if there is none, or a tensor is missing."""
    whole = model.architecture
    count = len(whole.layers)
    layout = layout_of(checkpoint.entries, count, checkpoint.directory)
    prefix = layout.prefix.format(count)
    if any(layer.window for layer in whole.layers):
        raise CheckpointError(f"{checkpoint.directory}: a head behind layers with windows is not computed")
    a = replace(whole, layers=whole.layers[-1:])
    reader = CheckpointReader(checkpoint, replace(names, layer=prefix), a, settings)
    norm, head = reader.norm(f"{prefix}{layout.norm}"), f"{prefix}{layout.head}"
    assert model.head.norm is not None
    linear = model.head.linear
    if reader.found(f"{head}.weight") is not None:
        linear = reader.linear((head,), a.vocabulary, a.hidden, TILE_ROWS)
    known, seen = (reader.norm(f"{prefix}{part}") for part in (layout.embedding, layout.feature))
    return TokenHead(
        a,
        (count - 1,),
        model.embedding,
        (model.head.norm, known, seen),
        reader.linear((layout.inputs(count),), a.hidden, 2 * a.hidden, TILE_ROWS, biased=False),
        build_block(LayerParts(reader, 0), a, 0, fused_append=False),
        Product(linear, None if layout.continued else norm, float32_out=True),
        torch.arange(a.vocabulary, device=settings.device),
        turns_of(a.layers[0].rope, a.head_dim, model.positions, settings.device),
        layout.swapped,
        norm if layout.continued else None,
    )
