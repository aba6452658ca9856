"""Named shapes with random weights for benchmarks: the cost of a step depends on sizes alone, so no download is
needed."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture, LatentSizes, Layer, Mixture, Names, Rope
from lowbit.engine.cache import CacheKind
from lowbit.engine.drafts.eagle import Eagle, eagle_taps
from lowbit.engine.drafts.heads import Model
from lowbit.engine.families import FAMILIES, NO_ROPE
from lowbit.engine.feed_forward import Router
from lowbit.engine.latent import Latent
from lowbit.engine.layers import TokenInputs, build_block
from lowbit.engine.products import Norm, Product
from lowbit.engine.ropes import plain_frequencies
from lowbit.engine.step import turns_of
from lowbit.engine.weights import Weights
from lowbit.quant.kernels.kv_cache import CACHE_NUMBERS, SAME
from lowbit.quant.kernels.packed import TILE_ROWS
from lowbit.quant.kernels.route_experts import Rule
from lowbit.quant.kernels.stack import StackedLinear, load_stack
from lowbit.quant.kernels.weight import Linear, inputs_of, load_weight
from lowbit.quant.kernels.wna16_experts import Gate
from lowbit.quant.numerics import coarse_scale
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, parse_scheme

# Schemes of a shape's linears; None is dense.
METHODS: dict[str, str | None] = {
    "dense": None,
    "int8": "int8-channel",
    "w4": "int4-g128",
    "w4a8": "int4-a8",
    "w8a8": "int8-channel-a8token",
    "w8a8-fp8": "fp8",
    "fp8": "fp8-a16",
    "fp8-block": "fp8-block",
    "fp8-block-a16": "fp8-block-a16",
    "nvfp4": "nvfp4-a16",
    "mxfp4": "mxfp4-a16",
    "w3": "int3-g128",
    "w2": "int2-g128",
    "experts-mxfp4": "mxfp4-a16",
}
EXPERTS_ALONE = ("experts-mxfp4",)  # all other linears of these methods are dense: gpt-oss as it is published


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


def with_mixture(shape: Architecture, mixture: Mixture, dense: int = 0, **changes: Any) -> Architecture:
    """`shape` with experts in all layers but the first `dense`, and other changes."""
    layers = tuple(replace(layer, mixture=mixture if i >= dense else None) for i, layer in enumerate(shape.layers))
    return replace(shape, layers=layers, **changes)


def wide_heads(shape: Architecture, head_dim: int, theta: float, turned: float = 1.0) -> Architecture:
    """`shape` with heads of `head_dim`, of which a share is rotated."""
    layer = Layer(None, Rope(plain_frequencies(int(head_dim * turned), theta)), head_dim**-0.5)
    return replace(shape, head_dim=head_dim, layers=(layer,) * len(shape.layers))


def qwen3_shape() -> Architecture:
    """Qwen3-30B-A3B: 128 experts in every layer, norms on heads."""
    plain = wide_heads(decoder_shape(151936, 2048, 6144, 32, 48, kv_heads=4), 128, 1e6)
    return with_mixture(plain, Mixture(128, 768, Rule(8)), family="qwen3_moe")


def gpt_oss_shape() -> Architecture:
    """gpt-oss-20b: sinks and biases, a window in every second layer, 32 experts with a clamped gate."""
    plain = wide_heads(decoder_shape(201088, 2880, 2880, 64, 24, kv_heads=8), 64, 1.5e5)
    windows = tuple(replace(layer, window=None if i % 2 else 128) for i, layer in enumerate(plain.layers))
    mixture = Mixture(32, 2880, Rule(4, "chosen", normalized=False), gate=Gate("clamped_mul", 7.0, 1.702))
    return with_mixture(replace(plain, layers=windows), mixture, family="gpt_oss")


def deepseek_shape() -> Architecture:
    """DeepSeek-V2-Lite: latent attention, one dense layer, then 64 experts and two for all tokens."""
    plain = wide_heads(decoder_shape(102400, 2048, 10944, 16, 27), 192, 1e4, turned=1 / 3)
    mixture = Mixture(64, 1408, Rule(6, normalized=False), shared=2816)
    latent = LatentSizes(q_rank=0, kv_rank=512, turned=64, v_dim=128)
    return with_mixture(plain, mixture, dense=1, family="deepseek_v2", latent=latent)


def glm_shape() -> Architecture:
    """GLM-4.5-Air: one dense layer, then 128 experts and one for all tokens."""
    plain = wide_heads(decoder_shape(151552, 4096, 10944, 96, 46, kv_heads=8), 128, 1e6, turned=0.5)
    mixture = Mixture(128, 1408, Rule(8, "sigmoid"), shared=1408)
    return with_mixture(plain, mixture, dense=1, family="glm4_moe", head_norms=False)


def gemma_shape() -> Architecture:
    """Gemma-4-26B-A4B: heads of 256 with windows, and every sixth layer of 512 without; 128 experts beside a
    feed-forward."""
    narrow = Layer(1024, Rope(plain_frequencies(256, 1e4)), 1.0)
    wide = Layer(None, Rope(plain_frequencies(512, 1e6)), 1.0, head_dim=512, kv_heads=2, v_is_k=True)
    plain = replace(
        decoder_shape(262144, 2816, 2112, 16, 30, kv_heads=8),
        head_dim=256,
        layers=tuple(narrow if layer % 6 else wide for layer in range(1, 31)),
        activation="gelu_tanh_mul",
        logit_softcap=30.0,
        value_norms=True,
    )
    return with_mixture(plain, Mixture(128, 704, Rule(8), beside=True), family="gemma4_text")


SHAPES = {
    "llama2-7b": decoder_shape(32000, 4096, 11008, 32, 32),
    "llama2-13b": decoder_shape(32000, 5120, 13824, 40, 40),
    "llama3-8b": decoder_shape(128256, 4096, 14336, 32, 32, kv_heads=8, theta=5e5),
    "chatglm2-6b": chatglm2_shape(),
    "codegeex-13b": codegeex_shape(),
    "mixtral-8x7b": with_mixture(
        decoder_shape(32000, 4096, 14336, 32, 32, kv_heads=8, theta=1e6), Mixture(8, 14336, Rule(2)), family="mixtral"
    ),
    "qwen3-30b-a3b": qwen3_shape(),
    "gpt-oss-20b": gpt_oss_shape(),
    "deepseek-v2-lite": deepseek_shape(),
    "glm-4.5-air": glm_shape(),
    "gemma-4-26b-a4b": gemma_shape(),
}


def random_weight(n: int, k: int, scheme: Scheme | None, like: Tensor) -> QTensor | Tensor:
    """A random weight (n, k) that preserves the scale of its inputs, with the dtype and device of `like`; quantized
    ones have one scale everywhere, and smaller groups if those of `scheme` do not divide the inputs."""
    scheme = scheme and scheme.fitting([(n, k)])
    if scheme is None:
        return torch.randn(n, k, dtype=like.dtype, device=like.device) / k**0.5
    number, coarse = scheme.number, scheme.weights.scales
    values = torch.rand(n, k, device=like.device).mul_(2).sub_(1).mul_(number.high)
    # uniform values deviate by high / sqrt(3)
    scale = torch.full(scheme.sides(n, k), 1.73 / number.high / k**0.5, device=like.device)
    divisor = 1 / scale[0, 0] if scheme.weights.parent else None
    scale = scale if divisor is None else torch.ones_like(scale)
    scales = scale.to(like.dtype) if coarse is None else coarse_scale(scale, coarse)
    return QTensor(number.encode(values), scales, None, scheme, divisor=divisor)


def random_linear(
    n: int, k: int, scheme: Scheme | None, like: Tensor, pair_block: int = TILE_ROWS, bias: bool = False
) -> Linear:
    """A random linear (n, k) that preserves the scale of its inputs, with the dtype and device of `like`."""
    zeros = torch.zeros(n, dtype=like.dtype, device=like.device) if bias else None
    weight = random_weight(n, k, scheme, like)
    return Linear(load_weight(weight, like.dtype, pair_block), zeros, inputs_of(weight))


class RandomParts:
    """Random parts of layers, without norms on outputs: see layers.Parts."""

    def __init__(self, architecture: Architecture, method: str, like: Tensor) -> None:
        self.architecture, named = architecture, METHODS[method]
        self.names = FAMILIES[architecture.family].names if architecture.family in FAMILIES else Names()
        self.expert_scheme = None if named is None else parse_scheme(named)
        self.scheme = None if method in EXPERTS_ALONE else self.expert_scheme
        self.like, self.biased = like, architecture.norm == "layer" or architecture.family == "gpt_oss"
        ones = torch.ones(architecture.hidden, dtype=like.dtype, device=like.device)
        bias = torch.zeros_like(ones) if architecture.norm == "layer" else None
        self.plain = Norm(architecture.norm, ones, bias, architecture.norm_eps)

    def linear(self, part: str, n: int, k: int, pair_block: int = TILE_ROWS) -> Linear:
        """See random_linear."""
        return random_linear(n, k, self.scheme, self.like, pair_block, self.biased)

    def router(self, mixture: Mixture) -> Router:
        """A router that spreads rows over all experts."""
        beside = mixture.beside
        weight = random_weight(mixture.experts, self.architecture.hidden, None, self.like)
        assert isinstance(weight, Tensor)
        bias = self.plain.weight.new_zeros(mixture.experts) if self.biased else None
        factors = torch.ones(mixture.experts, device=self.like.device) if beside else None
        return Router(weight, bias, None, mixture.rule, factors, self.plain if beside else None)

    def stack(self, part: str, mixture: Mixture, n: int, k: int) -> StackedLinear:
        """Random linears of all experts."""
        weight = random_weight(mixture.experts * n, k, self.expert_scheme, self.like)
        return StackedLinear(
            load_stack(weight, mixture.experts, self.like.dtype, part == "up"), None, inputs_of(weight)
        )

    def latent(self) -> tuple[Linear, Latent]:
        """Random products of multi-head latent attention."""
        a, like, sizes = self.architecture, self.plain.weight, self.architecture.latent
        assert sizes is not None
        rows = sizes.q_outputs(a) + sizes.kv_rank + sizes.turned
        q = random_linear(a.heads * a.head_dim, sizes.q_rank, self.scheme, self.like) if sizes.q_rank else None
        q_norm, kv_norm = like.new_ones(sizes.q_rank) if sizes.q_rank else None, like.new_ones(sizes.kv_rank)
        keys, values = (
            torch.randn(a.heads, width, sizes.kv_rank, dtype=like.dtype, device=like.device) / sizes.kv_rank**0.5
            for width in (a.head_dim - sizes.turned, sizes.v_dim)
        )
        latent = Latent(q, q_norm, kv_norm, keys, values, None, a)
        return random_linear(rows, a.hidden, self.scheme, self.like), latent

    def token_inputs(self) -> TokenInputs:
        """Random inputs of all layers for each token."""
        a, like, sizes = self.architecture, self.plain.weight, self.architecture.token_inputs
        assert sizes is not None
        rows = len(a.layers) * sizes.width
        table = torch.randn(sizes.vocabulary, rows, dtype=like.dtype, device=like.device)
        norm = Norm("rms", like.new_ones(sizes.width), None, a.norm_eps)
        return TokenInputs(table, Product(random_linear(rows, a.hidden, None, self.like)), norm)

    def sinks(self) -> Tensor | None:
        """Zeros, if the family has sinks."""
        a = self.architecture
        return (
            None if self.names.sinks is None else torch.zeros(a.heads, dtype=self.like.dtype, device=self.like.device)
        )

    def shared_gate(self) -> Tensor | None:
        """None: without a gate."""
        return None

    def norm(self, part: str) -> Norm | None:
        """A norm with weight 1; of outputs if the family has it."""
        return None if part.endswith("out_norm") and self.names.of(part) is None else self.plain

    def factor(self) -> float:
        """1: layers keep the scale of their inputs."""
        return 1.0

    def head_norm(self, part: str, width: int) -> Tensor | None:
        """A norm with weight 1, if the family has it."""
        if self.names.of(part) is None or not self.architecture.head_norms:
            return None
        return torch.ones(width, dtype=self.like.dtype, device=self.like.device)


class RandomHeadParts(RandomParts):
    """Random parts of an EAGLE-3 head's layer: see drafts/eagle.py."""

    def linear(self, part: str, n: int, k: int, pair_block: int = TILE_ROWS) -> Linear:
        """See EagleParts."""
        return super().linear(part, n, 2 * k if part == "qkv" else k, pair_block)

    def norm(self, part: str) -> Norm | None:
        """See EagleParts."""
        return None if part == "attention_norm" else super().norm(part)


def random_head(architecture: Architecture, method: str, model: Model, vocabulary: int) -> Eagle:
    """A random EAGLE-3 head for a model, with linears as in METHODS[method] and so many tokens."""
    a, like = replace(architecture, layers=architecture.layers[:1]), model.embedding
    parts, layers = RandomHeadParts(a, method, like[:0]), len(model.architecture.layers)
    taps = eagle_taps({}, layers)
    final = parts.linear("head", vocabulary, a.hidden)
    return Eagle(
        a,
        taps,
        like,
        parts.linear("fuse", a.hidden, len(taps) * model.architecture.hidden),
        (parts.plain, parts.plain),
        build_block(parts, a, 0, fused_append=True),
        Product(final, parts.plain, float32_out=True),
        torch.arange(vocabulary, device=like.device),
        turns_of(a.layers[0].rope, a.head_dim, model.positions, like.device),
    )


def random_weights(
    architecture: Architecture, method: str, like: Tensor, head: str = "dense", cache: str = "same"
) -> Weights:
    """Random weights of this architecture, with linears as in METHODS[method], and the dtype and device of `like`.

    head, cache  as in weights.Settings; scales of an fp8 cache are 1
    """
    a, number = architecture, SAME if cache == "auto" else CACHE_NUMBERS[cache]
    parts = RandomParts(a, method, like)
    embedding = torch.randn(a.vocabulary, a.hidden, dtype=like.dtype, device=like.device)
    positions = torch.zeros(a.max_positions, a.hidden, dtype=like.dtype, device=like.device) if a.positions else None
    final = random_linear(a.vocabulary, a.hidden, None if head == "dense" else parse_scheme(head), like)
    layers = tuple(build_block(parts, a, index, number == SAME) for index in range(len(a.layers)))
    scales: tuple[tuple[Tensor, Tensor], ...] = ()
    if number.scales == "head":
        heads = (a.heads_of(index).kv_heads for index in range(len(a.layers)))
        scales = tuple((torch.ones(count, device=like.device),) * 2 for count in heads)
    product = Product(final, parts.norm("norm"), float32_out=True)
    inputs = parts.token_inputs() if a.token_inputs else None
    return Weights(embedding, positions, layers, product, cache=CacheKind(number, scales), token_inputs=inputs)
