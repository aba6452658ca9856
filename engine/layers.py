"""The layers: attention and feed-forward as values, built from named parts and planned once at load."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture, Layer, Mixture
from lowbit.engine.attention import prompt_attention
from lowbit.engine.cache import Cache
from lowbit.engine.feed_forward import DenseForward, FeedForward, MixedForward, Router
from lowbit.engine.latent import Latent
from lowbit.engine.products import Hidden, Norm, Product, rounds_late
from lowbit.engine.step import Step, Turns
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import AppendCall, AttentionCall, NewCall, reason_against
from lowbit.quant.kernels.kv_cache import KVCache
from lowbit.quant.kernels.packed import TILE_ROWS
from lowbit.quant.kernels.problem import Rotary
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.stack import Experts, StackedLinear
from lowbit.quant.kernels.weight import Hints, Linear
from lowbit.quant.kernels.wna16_experts import Gate


@dataclass(frozen=True)
class Attention:
    """x + attention(norm(x)). One product computes q, k and v, another projects the heads back.

    q_norm, k_norm  (head_dim) weights of RMS norms on heads, or None
    index           index of the layer in the cache
    latent          attention from the outputs of `qkv`, or None: they are heads
    sinks           (heads) scores that take part in every softmax, without a value; None: there are none
    """

    qkv: Product
    o: Product
    q_norm: Tensor | None
    k_norm: Tensor | None
    architecture: Architecture
    index: int
    sinks: Tensor | None = None
    latent: Latent | None = None

    @property
    def layer(self) -> Layer:
        """The attention parameters of this layer."""
        return self.architecture.layers[self.index]

    def __call__(self, x: Hidden, step: Step, turns: Turns, cache: Cache) -> Hidden:
        """x + attention for rows (m, hidden), in the last layer for the wanted ones. Also writes the keys and values of
        all rows to the cache."""
        if self.latent is not None:
            heads = self.latent(self.qkv(x), step, turns, cache, self.index)
        else:
            heads = self.attended(x, step, turns, cache)
        return self.o.onto(self.wanted(x.h, step), self.wanted(heads, step))

    def wanted(self, rows: Tensor, step: Step) -> Tensor:
        """Of the rows (m, n) those that are computed after this attention."""
        last = self.index == len(self.architecture.layers) - 1
        return rows[step.wanted] if last and step.wanted is not None else rows

    def attended(self, x: Hidden, step: Step, turns: Turns, cache: Cache) -> Tensor:
        """The rows' attention (m, heads * head_dim). k and v, rotated, go to the cache."""
        kv, layer = cache.layers[self.index], self.layer
        if not step.alone or self.product_turns(kv):
            return self.attend(self.heads(x, step, turns, kv), step, cache)
        bounds = layer.scale, layer.window or 0, self.architecture.softcap or 0.0, step.longest
        append = self.append(x, step, turns, kv)
        in_panels = self.o.reads_panels(len(append.qkv))
        places = step.starts, step.positions
        return ops.attend_new(NewCall(append, *places, *bounds, self.sinks, in_panels, self.qkv.weight.in_rings))

    def product_turns(self, kv: KVCache) -> bool:
        """True if the qkv product itself rotates its heads and appends them to `kv`."""
        return kv.k_scales is None and self.q_norm is None and self.qkv.weight.turns(kv.head_dim)

    def heads(self, x: Hidden, step: Step, turns: Turns, kv: KVCache) -> Tensor:
        """q (m, heads * head_dim), rotated; k and v go to the cache."""
        if self.product_turns(kv):
            return self.qkv.turned(x, Rotary(step.turns, step.slots, turns.cosines, turns.sines, kv.k, kv.v))
        return ops.append_heads(self.append(x, step, turns, kv))

    def append(self, x: Hidden, step: Step, turns: Turns, kv: KVCache) -> AppendCall:
        """The append of the heads of x."""
        a, qkv = self.architecture, self.qkv(x)
        norms = self.q_norm, self.k_norm, a.norm_eps
        if a.joint_head_norms:
            qkv, norms = self.normed_together(qkv), (None, None, a.norm_eps)
        places = step.turns, step.slots, turns.cosines, turns.sines
        return AppendCall(qkv, *places, kv, *norms, self.qkv.hints.dependent)

    def normed_together(self, qkv: Tensor) -> Tensor:
        """The outputs (m, rows) of the qkv product, with one norm over all heads of q, and one over those of k."""
        a = self.architecture
        parts = qkv.split([heads * a.head_dim for heads in (a.heads, a.kv_heads, a.kv_heads)], -1)
        normed = (
            part if weight is None else ops.normalize(Rows(part.contiguous(), "rms", weight, None, a.norm_eps))
            for part, weight in zip(parts, (self.q_norm, self.k_norm, None), strict=True)
        )
        return torch.cat(list(normed), -1)

    def attend(self, q: Tensor, step: Step, cache: Cache) -> Tensor:
        """The rows' attention (m, heads * head_dim)."""
        a, layer = self.architecture, self.layer
        if step.prefix is not None:
            heads = cache.heads_at(self.index, step.prefix, q.dtype)
            return prompt_attention(q, *heads, a, layer, self.sinks, step.prompts)
        return ops.attend(
            AttentionCall(
                q,
                cache.layers[self.index],
                step.starts,
                step.positions,
                layer.scale,
                layer.window or 0,
                a.softcap or 0.0,
                step.longest,
                self.qkv.hints.dependent,
                self.sinks,
                1 if layer.window else step.adjacent,
                self.o.reads_panels(len(q)),
                self.qkv.weight.in_rings,
            )
        )


@dataclass(frozen=True)
class Block:
    """One layer."""

    attention: Attention
    feed_forward: FeedForward

    @property
    def products(self) -> tuple[Product, ...]:
        """The products whose launches are planned, in the order of use: qkv, o, those of the feed-forward."""
        return self.attention.qkv, self.attention.o, *self.feed_forward.products

    def planned(self, following: Product, dependent: bool, shared: bool) -> "Block":
        """A copy with launch hints: see layers.planned. `following` reads the result."""
        qkv = self.attention.qkv.hinted(Hints(dependent, self.attention.o.weight.bulk))
        o = self.attention.o.hinted(Hints(dependent, self.feed_forward.first))
        reader = None if self.attention.architecture.parallel else self.feed_forward.reader
        if shared and reader is not None:
            o = o.begun_for(reader)
        rest = self.feed_forward.planned(following, dependent, shared)
        return Block(replace(self.attention, qkv=qkv, o=o), rest)

    def step_nbytes(self, distinct: int) -> int:
        """Bytes of weights that a step reads which chooses so many experts."""
        latent = 0 if self.attention.latent is None else self.attention.latent.nbytes
        attention = self.attention.qkv.linear.nbytes + self.attention.o.linear.nbytes + latent
        return attention + self.feed_forward.step_nbytes(distinct)


class Parts(Protocol):
    """A source of a layer's parts, by the names in architecture.Names."""

    def linear(self, part: str, n: int, k: int, pair_block: int = TILE_ROWS) -> Linear:
        """A linear (n, k), with rows paired within blocks of `pair_block` if possible."""

    def router(self, mixture: Mixture) -> Router:
        """The router of a layer with experts."""

    def stack(self, part: str, mixture: Mixture, n: int, k: int) -> StackedLinear:
        """The linears (n, k) of all experts; of "up" gate and up in one."""

    def latent(self) -> tuple[Linear, Latent]:
        """The first product of multi-head latent attention, and the attention from its outputs."""

    def sinks(self) -> Tensor | None:
        """(heads): scores that take part in every softmax of attention; None if the family has none."""

    def shared_gate(self) -> Tensor | None:
        """(1, hidden): the gate of the feed-forward beside the experts; None if the family has none."""

    def norm(self, part: str) -> Norm | None:
        """A norm of hidden states; None if the family has none."""

    def head_norm(self, part: str) -> Tensor | None:
        """The weight of a norm of heads; None if the family has none."""


def build_block(parts: Parts, architecture: Architecture, index: int, fused_append: bool) -> Block:
    """Layer `index`; fused_append as in weights.Settings."""
    a = architecture
    q_norm, k_norm = parts.head_norm("q_norm"), parts.head_norm("k_norm")
    latent = None
    if a.latent is not None:
        qkv, latent = parts.latent()
    else:
        qkv = parts.linear("qkv", a.qkv_rows, a.hidden, a.head_dim if fused_append and q_norm is None else TILE_ROWS)
    o = parts.linear("o", a.hidden, a.o_inputs)
    attention_norm, mlp_norm = parts.norm("attention_norm"), parts.norm("mlp_norm")
    if a.parallel:
        mlp_norm = mlp_norm or attention_norm
    attention = Attention(
        Product(qkv, attention_norm),
        Product(o, after=parts.norm("attention_out_norm")),
        q_norm,
        k_norm,
        a,
        index,
        parts.sinks(),
        latent,
    )
    mixture = a.layers[index].mixture
    if mixture is not None:
        return Block(attention, build_mixed(parts, a, mixture, mlp_norm))
    return Block(attention, build_dense(parts, a, ("up", "down"), a.inner, mlp_norm))


def build_dense(
    parts: Parts, architecture: Architecture, names: tuple[str, str], inner: int, norm: Norm | None
) -> DenseForward:
    """The feed-forward with these parts as up and down."""
    a = architecture
    rows = inner * (2 if a.gated else 1)
    up = parts.linear(names[0], rows, a.hidden, rows if a.activation == "silu_mul" else TILE_ROWS)
    down = parts.linear(names[1], a.hidden, inner)
    late = rounds_late(up, down, a.activation)
    before, activation = (a.activation, "none") if late else ("none", a.activation)
    return DenseForward(Product(up, norm, activation), Product(down, before=before, after=parts.norm("mlp_out_norm")))


def build_mixed(parts: Parts, architecture: Architecture, mixture: Mixture, norm: Norm | None) -> MixedForward:
    """The feed-forward of a layer with experts."""
    a = architecture
    rows = mixture.inner * (2 if a.gated else 1)
    experts = Experts(
        parts.stack("up", mixture, rows, a.hidden),
        parts.stack("down", mixture, a.hidden, mixture.inner),
        mixture.gate or Gate(a.activation),
    )
    shared = None
    if mixture.shared:
        shared = build_dense(parts, a, ("shared_up", "shared_down"), mixture.shared, norm)
    assert norm is not None
    return MixedForward(norm, parts.router(mixture), experts, shared, parts.shared_gate() if mixture.shared else None)


def planned(
    blocks: tuple[Block, ...], head: Product, dependent: bool, shared: bool
) -> tuple[tuple[Block, ...], Product]:
    """Blocks and head with launch hints set: each product prefetches the weight of the product after it, the head that
    of the first layer.

    dependent  True: a launch starts before the one before it has ended
    shared     True: norms may be fused into the products before and after them
    """
    following = [*(block.attention.qkv for block in blocks[1:]), head]
    layers = tuple(block.planned(after, dependent, shared) for block, after in zip(blocks, following, strict=True))
    return layers, head.hinted(Hints(dependent, blocks[0].attention.qkv.weight.bulk))


def captures(blocks: Sequence[Block], cache: Cache, rows: int, dtype: torch.dtype) -> bool:
    """True if a graph can capture a step of so many rows, with activations in `dtype`.

    Without the attention kernel, plain torch runs, whose shapes depend on positions (those of latent attention do not);
    nor can many rows of experts be captured.
    """
    kv = cache.layers[0]
    if blocks[0].attention.latent is not None:
        kv = replace(kv, k=kv.v)  # a width that the kernels take
    heads = torch.empty(0, dtype=dtype, device=kv.k.device)
    return all(block.feed_forward.captures(rows) for block in blocks) and reason_against(heads, kv) is None
