"""Named shapes with random weights for benchmarks: the cost of a step depends on sizes alone, so no download is
needed."""

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture, Layer, Rope
from lowbit.engine.families import NO_ROPE, plain_frequencies
from lowbit.engine.layers import build_block
from lowbit.engine.products import Norm, Product
from lowbit.engine.weights import Weights
from lowbit.quant.kernels.packed import TILE_ROWS
from lowbit.quant.kernels.weight import Dense, Linear, inputs_of, load_weight
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, parse_scheme

# Schemes of a shape's linears; None is dense.
METHODS: dict[str, str | None] = {
    "dense": None,
    "int8": "int8-channel",
    "w4": "int4-g128",
    "w8a8": "int8-channel-a8token",
}


def decoder_shape(
    vocabulary: int, hidden: int, inner: int, heads: int, layers: int, kv_heads: int = 0, theta: float = 1e4
) -> Architecture:
    """Llama's architecture with these sizes."""
    head_dim = hidden // heads
    rope = Rope(plain_frequencies(head_dim, theta))
    return Architecture(
        family="llama",
        vocabulary=vocabulary,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        layers=(Layer(None, rope, head_dim**-0.5),) * layers,
        max_positions=1 << 17,
    )


def chatglm2_shape() -> Architecture:
    """ChatGLM2-6B: half of each head is rotated, in adjacent pairs."""
    rope = Rope(plain_frequencies(64, 1e4), adjacent=True)
    return replace(decoder_shape(65024, 4096, 13696, 32, 28, kv_heads=2), layers=(Layer(None, rope, 128**-0.5),) * 28)


def codegeex_shape() -> Architecture:
    """CodeGeeX-13B's sizes: LayerNorm, quick GELU, learned positions; without the last layer's special query."""
    return replace(
        decoder_shape(52224, 5120, 20480, 40, 40),
        family="codegeex",
        layers=(Layer(None, NO_ROPE, 128**-0.5),) * 40,
        norm="layer",
        activation="quick_gelu",
        positions=True,
        max_positions=4096,
    )


SHAPES = {
    "llama2-7b": decoder_shape(32000, 4096, 11008, 32, 32),
    "llama2-13b": decoder_shape(32000, 5120, 13824, 40, 40),
    "llama3-8b": decoder_shape(128256, 4096, 14336, 32, 32, kv_heads=8, theta=5e5),
    "chatglm2-6b": chatglm2_shape(),
    "codegeex-13b": codegeex_shape(),
}


def random_linear(
    n: int, k: int, scheme: Scheme | None, like: Tensor, pair_block: int = TILE_ROWS, bias: bool = False
) -> Linear:
    """A random linear (n, k) that preserves the scale of its inputs, with the dtype and device of `like`."""
    zeros = torch.zeros(n, dtype=like.dtype, device=like.device) if bias else None
    if scheme is None:
        return Linear(Dense(torch.randn(n, k, dtype=like.dtype, device=like.device) / k**0.5), zeros)
    high = int(scheme.number.high)
    codes = torch.randint(-high, high + 1, (n, k), dtype=torch.int8, device=like.device)
    scale = 1.73 / high / k**0.5  # uniform codes deviate by high / sqrt(3)
    scales = torch.full((n, scheme.groups(k)), scale, dtype=like.dtype, device=like.device)
    weight = QTensor(codes, scales, None, scheme)
    return Linear(load_weight(weight, like.dtype, pair_block), zeros, inputs_of(weight))


class RandomParts:
    """Random parts of layers, without norms on heads or outputs: see layers.Parts."""

    def __init__(self, architecture: Architecture, scheme: Scheme | None, like: Tensor) -> None:
        self.scheme, self.like, self.biased = scheme, like, architecture.norm == "layer"
        ones = torch.ones(architecture.hidden, dtype=like.dtype, device=like.device)
        bias = torch.zeros_like(ones) if self.biased else None
        self.plain = Norm(architecture.norm, ones, bias, architecture.norm_eps)

    def linear(self, part: str, n: int, k: int, pair_block: int = TILE_ROWS) -> Linear:
        """See random_linear."""
        return random_linear(n, k, self.scheme, self.like, pair_block, self.biased)

    def norm(self, part: str) -> Norm | None:
        """A norm with weight 1; None for norms of outputs."""
        return None if part.endswith("out_norm") else self.plain

    def head_norm(self, part: str) -> Tensor | None:
        """None: no norms on heads."""
        return None


def random_weights(
    architecture: Architecture, method: str, like: Tensor, head: str = "dense", fused_append: bool = True
) -> Weights:
    """Random weights of this architecture, with linears as in METHODS[method], and the dtype and device of `like`.

    head, fused_append  as in weights.Settings
    """
    a = architecture
    parts = RandomParts(a, None if METHODS[method] is None else parse_scheme(str(METHODS[method])), like)
    embedding = torch.randn(a.vocabulary, a.hidden, dtype=like.dtype, device=like.device)
    positions = torch.zeros(a.max_positions, a.hidden, dtype=like.dtype, device=like.device) if a.positions else None
    final = random_linear(a.vocabulary, a.hidden, None if head == "dense" else parse_scheme(head), like)
    layers = tuple(build_block(parts, a, index, fused_append) for index in range(len(a.layers)))
    return Weights(embedding, positions, layers, Product(final, parts.norm("norm"), float32_out=True))
