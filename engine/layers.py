"""The layers: attention and feed-forward as values, built from named parts and planned once at load."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Architecture, HeadSizes, Layer, Mixture
from lowbit.engine.attention import prompt_attention
from lowbit.engine.cache import Cache
from lowbit.engine.feed_forward import BesideForward, DenseForward, FeedForward, MixedForward, Router
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

    @property
    def sizes(self) -> HeadSizes:
        """The heads of this layer."""
        return self.architecture.heads_of(self.index)

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
        if not step.alone or self.product_turns(kv) or not self.sizes.made:
            return self.attend(self.heads(x, step, turns, kv), step, cache)
        bounds = layer.scale, layer.window or 0, self.architecture.softcap or 0.0, step.longest
        append = self.append(x, step, turns, kv)
        in_panels = self.o.reads_panels(len(append.qkv))
        places = step.starts, step.positions
        return ops.attend_new(NewCall(append, *places, *bounds, self.sinks, in_panels, self.qkv.weight.in_rings))

    def product_turns(self, kv: KVCache) -> bool:
        """True if the qkv product itself rotates its heads and appends them to `kv`."""
        plain = kv.k_scales is None and self.q_norm is None and not self.architecture.value_norms
        return plain and self.sizes.made > 0 and self.qkv.weight.turns(kv.head_dim)

    def heads(self, x: Hidden, step: Step, turns: Turns, kv: KVCache) -> Tensor:
        """q (m, heads * head_dim), rotated; k and v go to the cache."""
        if self.product_turns(kv):
            return self.qkv.turned(x, Rotary(step.turns, step.slots, turns.cosines, turns.sines, kv.k, kv.v))
        return ops.append_heads(self.append(x, step, turns, kv))

    def append(self, x: Hidden, step: Step, turns: Turns, kv: KVCache) -> AppendCall:
        """The append of the heads of x; of q alone if the layer reads another one's keys and values."""
        a, qkv = self.architecture, self.qkv(x)
        kv = kv if self.sizes.made else kv.without_heads
        norms = self.q_norm, self.k_norm, a.norm_eps
        if a.joint_head_norms:
            qkv, norms = self.normed_together(qkv), (None, None, a.norm_eps)
        places = step.turns, step.slots, turns.cosines, turns.sines
        return AppendCall(qkv, *places, kv, *norms, self.qkv.hints.dependent, a.value_norms)

    def normed_together(self, qkv: Tensor) -> Tensor:
        """The outputs (m, rows) of the qkv product, with one norm over all heads of q, and one over those of k."""
        sizes, eps = self.sizes, self.architecture.norm_eps
        parts = qkv.split([heads * sizes.head_dim for heads in (sizes.heads, sizes.made, sizes.made)], -1)
        normed = (
            part if weight is None else ops.normalize(Rows(part.contiguous(), "rms", weight, None, eps))
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
class TokenInput:
    """keeps * x + norm(onto(act(gate(x)) * input)): a layer's end that adds the input it has of its own for each token.

    onto  with the norm, and `keeps`
    """

    gate: Product
    onto: Product

    @property
    def products(self) -> tuple[Product, ...]:
        return self.gate, self.onto

    def planned(self, following: Product, dependent: bool) -> "TokenInput":
        """A copy with launch hints."""
        gate = self.gate.hinted(Hints(dependent, self.onto.weight.bulk))
        return TokenInput(gate, self.onto.hinted(Hints(dependent, following.weight.bulk)))

    def __call__(self, x: Hidden, inputs: Tensor) -> Hidden:
        """The layer's output (m, hidden) for x (m, hidden) and inputs (m, width)."""
        return self.onto.onto(x.h, self.gate(x.h) * inputs)


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of all layers, for each token: (norm(projection(x)) + lookup) / sqrt(2).

    table       (vocabulary, layers * width), times the square root of the width
    projection  the embedding to (layers * width)
    norm        (width) of each layer's part, divided by sqrt(2)
    """

    table: Tensor
    projection: Product
    norm: Norm

    def __call__(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The inputs (m, layers, width) of tokens (m), whose embeddings are x (m, hidden)."""
        width = len(self.norm.weight)
        made = ops.normalize(self.norm.of(Rows(self.projection(x).view(-1, width))))
        found = functional.embedding(tokens, self.table).view(-1, width)
        return torch.add(made, found, alpha=(width / 2) ** 0.5).view(len(tokens), -1, width)


@dataclass(frozen=True)
class Block:
    """One layer."""

    attention: Attention
    feed_forward: FeedForward
    token_input: TokenInput | None = None

    @property
    def products(self) -> tuple[Product, ...]:
        """The products whose launches are planned, in the order of use: qkv, o, those of the feed-forward, and those of
        the layer's own input."""
        own = () if self.token_input is None else self.token_input.products
        return self.attention.qkv, self.attention.o, *self.feed_forward.products, *own

    def planned(self, following: Product, dependent: bool, shared: bool) -> "Block":
        """A copy with launch hints: see layers.planned. `following` reads the result."""
        qkv = self.attention.qkv.hinted(Hints(dependent, self.attention.o.weight.bulk))
        o = self.attention.o.hinted(Hints(dependent, self.feed_forward.first))
        reader = None if self.attention.architecture.parallel else self.feed_forward.reader
        if shared and reader is not None:
            o = o.begun_for(reader)
        attention, own = replace(self.attention, qkv=qkv, o=o), self.token_input
        if own is None:
            return Block(attention, self.feed_forward.planned(following, dependent, shared))
        rest = self.feed_forward.planned(own.gate, dependent, shared=False)
        return Block(attention, rest, own.planned(following, dependent))

    def step_nbytes(self, distinct: int) -> int:
        """Bytes of weights that a step reads which chooses so many experts."""
        latent = 0 if self.attention.latent is None else self.attention.latent.nbytes
        attention = self.attention.qkv.linear.nbytes + self.attention.o.linear.nbytes + latent
        own = () if self.token_input is None else self.token_input.products
        return attention + self.feed_forward.step_nbytes(distinct) + sum(product.linear.nbytes for product in own)


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

    def factor(self) -> float:
        """The factor of the layer's output."""

    def head_norm(self, part: str, width: int) -> Tensor | None:
        """The weight (width) of a norm of heads; None if the family has none."""


def build_block(parts: Parts, architecture: Architecture, index: int, fused_append: bool) -> Block:
    """Layer `index`; fused_append as in weights.Settings."""
    a, sizes = architecture, architecture.heads_of(index)
    together = (sizes.heads, sizes.made) if a.joint_head_norms else (1, 1)
    q_norm, k_norm = (
        parts.head_norm(part, heads * sizes.head_dim) if sizes.made or part == "q_norm" else None
        for part, heads in zip(("q_norm", "k_norm"), together, strict=True)
    )
    latent = None
    if a.latent is not None:
        qkv, latent = parts.latent()
    else:
        turned = fused_append and q_norm is None
        qkv = parts.linear("qkv", sizes.qkv_rows, a.hidden, sizes.head_dim if turned else TILE_ROWS)
    o = parts.linear("o", a.hidden, a.o_inputs(index))
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
    norms = NormsAround(mlp_norm, parts.norm("mlp_out_norm"), parts.factor() if not a.token_inputs else 1.0)
    mixture = a.layers[index].mixture
    if mixture is None:
        forward: FeedForward = build_dense(parts, a, ("up", "down"), a.inner_of(index), norms)
    elif mixture.beside:
        forward = build_beside(parts, a, index, norms)
    else:
        forward = build_mixed(parts, a, mixture, mlp_norm)
    return Block(attention, forward, build_token_input(parts, a) if a.token_inputs else None)


@dataclass(frozen=True)
class NormsAround:
    """The norms before and behind a feed-forward, and the factor of the layer's output, which has a norm behind it."""

    before: Norm | None
    after: Norm | None = None
    keeps: float = 1.0

    @property
    def scaled(self) -> Norm | None:
        """The norm behind, times the factor."""
        return self.after if self.after is None or self.keeps == 1.0 else self.after.scaled(self.keeps)


def build_token_input(parts: Parts, architecture: Architecture) -> TokenInput:
    """The end of a layer that has an input of its own for each token."""
    a, norms, sizes = (
        architecture,
        NormsAround(None, parts.norm("token_out_norm"), parts.factor()),
        architecture.token_inputs,
    )
    assert sizes is not None
    gate = parts.linear("token_gate", sizes.width, a.hidden)
    onto = parts.linear("token_onto", a.hidden, sizes.width)
    activation = a.activation.removesuffix("_mul")
    return TokenInput(Product(gate, activation=activation), Product(onto, after=norms.scaled, keeps=norms.keeps))


def build_dense(
    parts: Parts, architecture: Architecture, names: tuple[str, str], inner: int, norms: NormsAround
) -> DenseForward:
    """The feed-forward with these parts as up and down."""
    a = architecture
    rows = inner * (2 if a.gated else 1)
    up = parts.linear(names[0], rows, a.hidden, rows if a.activation == "silu_mul" else TILE_ROWS)
    down = parts.linear(names[1], a.hidden, inner)
    late = rounds_late(up, down, a.activation)
    before, activation = (a.activation, "none") if late else ("none", a.activation)
    inward = Product(up, norms.before, activation)
    return DenseForward(inward, Product(down, before=before, after=norms.scaled, keeps=norms.keeps))


def build_beside(parts: Parts, architecture: Architecture, index: int, norms: NormsAround) -> BesideForward:
    """The feed-forward of a layer with experts beside its dense one."""
    a, mixture = architecture, architecture.layers[index].mixture
    around = NormsAround(norms.before, parts.norm("dense_out_norm"))
    dense = build_dense(parts, a, ("up", "down"), a.inner_of(index), around)
    behind, after = parts.norm("expert_out_norm"), norms.scaled
    assert mixture is not None
    assert behind is not None
    assert after is not None
    return BesideForward(dense, build_mixed(parts, a, mixture, parts.norm("expert_norm")), behind, after, norms.keeps)


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
        around = NormsAround(norm, parts.norm("mlp_out_norm"))
        shared = build_dense(parts, a, ("shared_up", "shared_down"), mixture.shared, around)
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
    heads, layers = torch.empty(0, dtype=dtype, device=cache.layers[0].k.device), cache.layers
    if blocks[0].attention.latent is not None:
        layers = tuple(replace(kv, k=kv.v) for kv in layers)  # a width that the kernels take
    taken = all(reason_against(heads, kv) is None for kv in layers)
    return taken and all(block.feed_forward.captures(rows) for block in blocks)
