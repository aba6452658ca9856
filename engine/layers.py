"""The layers: attention and feed-forward as values, built from named parts and planned once at load."""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from lowbit.engine.architecture import Architecture, Layer
from lowbit.engine.attention import prompt_attention
from lowbit.engine.cache import Cache
from lowbit.engine.products import Hidden, Norm, Product, consumer_of, rounds_late
from lowbit.engine.step import Step, Turns
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import AppendCall, AttentionCall, KVCache
from lowbit.quant.kernels.packed import TILE_ROWS
from lowbit.quant.kernels.problem import Rotary
from lowbit.quant.kernels.weight import Hints, Linear


@dataclass(frozen=True)
class Attention:
    """x + attention(norm(x)). One product computes q, k and v, another projects the heads back.

    q_norm, k_norm  (head_dim) weights of RMS norms on heads, or None
    index           index of the layer in the cache
    """

    qkv: Product
    o: Product
    q_norm: Tensor | None
    k_norm: Tensor | None
    architecture: Architecture
    index: int

    @property
    def layer(self) -> Layer:
        """The attention parameters of this layer."""
        return self.architecture.layers[self.index]

    def __call__(self, x: Hidden, step: Step, turns: Turns, cache: Cache) -> Hidden:
        """x + attention for rows (m, hidden). Also writes their keys and values to the cache."""
        q = self.heads(x, step, turns, cache.layers[self.index])
        return self.o.onto(x.h, self.attend(q, step, cache))

    def heads(self, x: Hidden, step: Step, turns: Turns, kv: KVCache) -> Tensor:
        """q (m, heads * head_dim), rotated; k and v go to the cache."""
        places = step.turns, step.slots, turns.cosines, turns.sines
        if kv.k_scales is None and self.q_norm is None and self.qkv.weight.turns(kv.head_dim):
            return self.qkv.turned(x, Rotary(*places, kv.k, kv.v))
        norms = self.q_norm, self.k_norm, self.architecture.norm_eps
        return ops.append_heads(AppendCall(self.qkv(x), *places, kv, *norms, self.qkv.hints.dependent))

    def attend(self, q: Tensor, step: Step, cache: Cache) -> Tensor:
        """The rows' attention (m, heads * head_dim)."""
        a, layer = self.architecture, self.layer
        if step.prefix is not None:
            return prompt_attention(q, *cache.heads_at(self.index, step.prefix, q.dtype), a, layer)
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
            )
        )


@dataclass(frozen=True)
class FeedForward:
    """residual + down(act(up(norm(x)))), with the gate's rows stacked on those of up if there is a gate."""

    up: Product
    down: Product

    def __call__(self, x: Hidden, residual: Tensor) -> Hidden:
        """residual (m, hidden) + the feed-forward of x (m, hidden)."""
        return self.down.onto(residual, self.up(x))


@dataclass(frozen=True)
class Block:
    """One layer."""

    attention: Attention
    feed_forward: FeedForward

    @property
    def products(self) -> tuple[Product, Product, Product, Product]:
        """All products, in the order of use."""
        return self.attention.qkv, self.attention.o, self.feed_forward.up, self.feed_forward.down

    def with_products(self, qkv: Product, o: Product, up: Product, down: Product) -> "Block":
        """A copy with these products."""
        return Block(replace(self.attention, qkv=qkv, o=o), FeedForward(up, down))


class Parts(Protocol):
    """A source of a layer's parts, by the names in architecture.Names."""

    def linear(self, part: str, n: int, k: int, pair_block: int = TILE_ROWS) -> Linear:
        """A linear (n, k), with rows paired within blocks of `pair_block` if possible."""

    def norm(self, part: str) -> Norm | None:
        """A norm of hidden states; None if the family has none."""

    def head_norm(self, part: str) -> Tensor | None:
        """The weight of a norm of heads; None if the family has none."""


def build_block(parts: Parts, architecture: Architecture, index: int, fused_append: bool) -> Block:
    """Layer `index`; fused_append as in weights.Settings."""
    a = architecture
    q_norm, k_norm = parts.head_norm("q_norm"), parts.head_norm("k_norm")
    inner = a.inner * (2 if a.gated else 1)
    qkv = parts.linear("qkv", a.qkv_rows, a.hidden, a.head_dim if fused_append and q_norm is None else TILE_ROWS)
    o = parts.linear("o", a.hidden, a.heads * a.head_dim)
    up = parts.linear("up", inner, a.hidden, inner if a.activation == "silu_mul" else TILE_ROWS)
    down = parts.linear("down", a.hidden, a.inner)
    late = rounds_late(up, down, a.activation)
    before, activation = (a.activation, "none") if late else ("none", a.activation)
    attention_norm, mlp_norm = parts.norm("attention_norm"), parts.norm("mlp_norm")
    if a.parallel:
        mlp_norm = mlp_norm or attention_norm
    return Block(
        Attention(
            Product(qkv, attention_norm), Product(o, after=parts.norm("attention_out_norm")), q_norm, k_norm, a, index
        ),
        FeedForward(Product(up, mlp_norm, activation), Product(down, before=before, after=parts.norm("mlp_out_norm"))),
    )


def planned(
    blocks: tuple[Block, ...], head: Product, dependent: bool, shared: bool
) -> tuple[tuple[Block, ...], Product]:
    """Blocks and head with launch hints set: each product prefetches the weight of the product after it, the head that
    of the first layer.

    dependent  True: a launch starts before the one before it has ended
    shared     True: norms may be fused into the products before and after them
    """
    products = [*(product for block in blocks for product in block.products), head]
    following = [*products[1:], products[0]]
    ready = [
        replace(product, linear=replace(product.linear, hints=Hints(dependent, after.weight.bulk)))
        for product, after in zip(products, following, strict=True)
    ]
    layers = []
    for index, block in enumerate(blocks):
        qkv, o, up, down = ready[4 * index : 4 * index + 4]
        if shared:
            parallel = block.attention.architecture.parallel
            o = o if parallel else replace(o, consumer=consumer_of(o.linear, up))
            down = replace(down, consumer=consumer_of(down.linear, following[4 * index + 3]))
        layers.append(block.with_products(qkv, o, up, down))
    return tuple(layers), ready[-1]
