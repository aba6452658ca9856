"""The one decoder: every family's step, prompts and decode alike.

A step takes m rows, each a token of some sequence at some position. Everything but attention treats rows alone; where
they stand is in the step's tensors, so that one captured graph serves every position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Architecture, Layer, Rope
from lowbit.engine.attention import prompt_attention
from lowbit.engine.cache import Cache
from lowbit.engine.products import (
    Hidden,
    Linear,
    Norm,
    Reader,
    beginning_product,
    begins_norm,
    gated_product,
    prepared,
    product,
    rounds_late,
    taken,
)
from lowbit.engine.weights import LayerWeights, Weights, chained
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import Append, Attention
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import Rotary


@dataclass(frozen=True)
class Step:
    """What one pass computes.

    tokens, positions  (m) int64
    turns              (m) int64  each row's place in the tables of turns: see Decoder.turns_at
    starts             (m) int64  the cache's slot of position 0 of each row's sequence
    slots              (m) int64  starts + positions: where each row's keys and values go
    longest            positions that no row's sequence comes beyond; 0 where nobody knows
    prompt             (sequence, length): the rows are the last of `length` positions of one sequence; None where each
                       row attends by itself
    """

    tokens: Tensor
    positions: Tensor
    turns: Tensor
    starts: Tensor
    slots: Tensor
    longest: int = 0
    prompt: tuple[int, int] | None = None


@dataclass(frozen=True)
class Turns:
    """cosines, sines (places, head_dim / 2) float32 of one rope; 1 and 0 for inputs that do not turn."""

    cosines: Tensor
    sines: Tensor


def turns_of(rope: Rope, head_dim: int, positions: int, device: torch.device) -> Turns:
    """The table of a rope for positions below `positions`; the long frequencies' below it, where they can be needed."""
    counted = torch.arange(positions, dtype=torch.float32).unsqueeze(1)
    angles = counted * rope.frequencies.float()
    if rope.long is not None and positions > rope.short:
        angles = torch.cat([angles, counted * rope.long.float()])
    still = head_dim // 2 - angles.shape[1]
    cosines = functional.pad(angles.cos() * rope.scaling, (0, still), value=1.0)
    sines = functional.pad(angles.sin() * rope.scaling, (0, still))
    return Turns(cosines.to(device), sines.to(device))


class Decoder:
    """A model's weights and its computation. Nothing here changes after construction; caches are passed in."""

    def __init__(self, architecture: Architecture, weights: Weights, context: int) -> None:
        self.architecture, self.weights, self.context = architecture, chained(weights), context
        # ropes are shared among layers: one table each
        tables: dict[int, Turns] = {}
        for layer in architecture.layers:
            rope = layer.rope
            if id(rope) not in tables:
                tables[id(rope)] = turns_of(rope, architecture.head_dim, context, weights.device)
        self.turns = [tables[id(layer.rope)] for layer in architecture.layers]
        short = architecture.short
        # sequences longer than this turn otherwise (longrope); None where all that fit the context turn alike
        self.short = short if short is not None and short < context else None
        # dependent launches are for captured graphs; on a CPU the operators ignore them
        self.dependent = weights.device.type == "cuda"
        # norms are shared out between products to save a GPU their launches; a CPU has only what that costs
        self.deferring = weights.device.type == "cuda"

    def hidden(self, step: Step, cache: Cache) -> Hidden:
        """The last layer's output (m, hidden); the cache holds the rows' keys and values afterwards."""
        x = Hidden(self.embed(step))
        for index in range(len(self.architecture.layers)):
            x = self.layer(x, index, step, cache)
        return x

    def turns_at(self, positions: Tensor, lengths: Tensor | int) -> Tensor:
        """The places (m) in the tables of turns for rows at `positions` (m) of sequences of `lengths` (m, or one)."""
        if self.short is None:
            return positions
        return positions + self.context * (lengths > self.short)

    def step(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Step:
        """The step of rows of which each is the last of its sequence."""
        return Step(tokens, positions, self.turns_at(positions, positions + 1), starts, starts + positions)

    def embed(self, step: Step) -> Tensor:
        """The rows' embeddings (m, hidden)."""
        x = functional.embedding(step.tokens, self.weights.embedding)
        if self.architecture.embedding_scale != 1.0:
            x = x * torch.tensor(self.architecture.embedding_scale, dtype=x.dtype).item()
        if self.weights.positions is not None:
            x = x + functional.embedding(step.positions, self.weights.positions)
        return x

    def layer(self, x: Hidden, index: int, step: Step, cache: Cache) -> Hidden:
        """One layer's output (m, hidden)."""
        a, w = self.architecture, self.weights.layers[index]
        attended = self.attend(self.heads(x, w, index, step, cache), index, step, cache)
        deferring = self.deferring and step.prompt is None
        reader = Reader(w.up, w.mlp_norm) if deferring else None
        h = self.into_residual(attended, w.o, w.attention_out_norm, x.h, reader)
        source, norm = (x, w.mlp_norm or w.attention_norm) if a.parallel else (h, w.mlp_norm)
        late = rounds_late(w.up, w.down, a.activation)
        if a.gated and not late:
            inner = gated_product(source, w.up, norm, a.activation, self.dependent)
        else:
            inner = product(source, w.up, norm, "none" if late else a.activation, dependent=self.dependent)
        reader = self.reader_after(index) if deferring else None
        return self.into_residual(inner, w.down, w.mlp_out_norm, h.h, reader, a.activation if late else "none")

    def reader_after(self, index: int) -> Reader:
        """What reads the output of layer `index`."""
        following = self.weights.layers[index + 1 :][:1]
        if not following:
            return Reader(self.weights.head, self.weights.norm)
        return Reader(following[0].qkv, following[0].attention_norm)

    def into_residual(
        self,
        x: Tensor,
        linear: Linear,
        out_norm: Norm | None,
        residual: Tensor,
        reader: Reader | None,
        before: str = "none",
    ) -> Hidden:
        """residual + before(x) W^T, the product normed where the family does so; the norm of `reader` may be begun."""
        if out_norm is not None:
            y = product(x, linear, dependent=self.dependent, before=before)
            return Hidden(residual + prepared(y, None, out_norm, self.dependent))
        if reader is not None and reader.norm is not None and begins_norm(linear, reader, len(x)):
            return beginning_product(x, linear, residual, reader.norm, self.dependent)
        return Hidden(product(x, linear, residual=residual, dependent=self.dependent, before=before))

    def heads(self, x: Hidden, w: LayerWeights, index: int, step: Step, cache: Cache) -> Tensor:
        """q (m, heads * head_dim), turned; k and v are in the cache."""
        kv, turns = cache.layers[index], self.turns[index]
        weight = w.qkv.weight
        fused = kv.k_scales is None and w.q_norm is None
        if fused and isinstance(weight, PackedWeight) and weight.pair_block == kv.head_dim:
            rotary = Rotary(step.turns, step.slots, turns.cosines, turns.sines, kv.k, kv.v)
            inputs, deferred = taken(x, w.qkv, w.attention_norm, self.dependent)
            bias, ahead = w.qkv.bias, w.qkv.next_weight
            return ops.qkv_rotary_append(
                inputs, weight, rotary, bias, dependent=self.dependent, next_weight=ahead, deferred=deferred
            )
        qkv = product(x, w.qkv, w.attention_norm, dependent=self.dependent)
        eps = self.architecture.norm_eps
        return ops.append_heads(
            Append(qkv, step.turns, step.slots, turns.cosines, turns.sines, kv, w.q_norm, w.k_norm, eps, self.dependent)
        )

    def attend(self, q: Tensor, index: int, step: Step, cache: Cache) -> Tensor:
        """The rows' attention (m, heads * head_dim)."""
        a = self.architecture
        layer: Layer = a.layers[index]
        if step.prompt is not None:
            sequence, length = step.prompt
            k, v = cache.prefix(index, sequence, length, q.dtype)
            return prompt_attention(q, k, v, a, layer)
        return ops.attend(
            Attention(
                q,
                cache.layers[index],
                step.starts,
                step.positions,
                layer.scale,
                layer.window or 0,
                a.softcap or 0.0,
                step.longest,
                self.dependent,
            )
        )

    def logits(self, hidden: Tensor | Hidden) -> Tensor:
        """The logits (m, vocabulary) float32 of rows of the last layer's output (m, hidden)."""
        weights, cap = self.weights, self.architecture.logit_softcap
        logits = product(hidden, weights.head, weights.norm, dependent=self.dependent, float32_out=True)
        return logits if cap is None else cap * torch.tanh(logits / cap)
