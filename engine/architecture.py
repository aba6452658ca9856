"""Architecture of a decoder: the numbers that affect its computation, and the names of its tensors in a file."""

import math
from dataclasses import dataclass

from torch import Tensor

from lowbit.quant.kernels.route_experts import Rule
from lowbit.quant.kernels.wna16_experts import Gate

SIZES = ("vocabulary", "hidden", "inner", "heads", "kv_heads", "head_dim", "max_positions")
GATED_ACTIVATIONS = ("silu_mul", "gelu_tanh_mul")  # act(gate) * up; other activations have a single product


@dataclass(frozen=True)
class Rope:
    """A rotary embedding. Pair j of a head rotates by position * frequencies[j]; cosines and sines are scaled by
    `scaling`.

    frequencies  (pairs,) float64  empty with learned positions
    adjacent     True: inputs 2 j and 2 j + 1 form a pair (GPT-J, GLM); False: j and j + pairs (NeoX, Llama)
    long         (pairs,) frequencies for sequences longer than `short` positions (longrope), or None
    """

    frequencies: Tensor
    scaling: float = 1.0
    adjacent: bool = False
    long: Tensor | None = None
    short: int = 0


@dataclass(frozen=True)
class Mixture:
    """The sizes of a layer whose feed-forward is a mixture of experts.

    experts  number of experts
    inner    inner size of each
    rule     the choice of a token's experts
    shared   inner size of the feed-forward that every token passes besides; 0 for none
    gate     the activation of an expert, or None for that of all feed-forwards
    """

    experts: int
    inner: int
    rule: Rule
    shared: int = 0
    gate: Gate | None = None

    def reason_against(self) -> str | None:
        """The reason why these sizes are invalid, or None."""
        for name, value, least in (("experts", self.experts, 1), ("inner", self.inner, 1), ("shared", self.shared, 0)):
            if type(value) is not int or value < least:
                return f"{name} of a mixture is {value!r}; a number from {least} is needed"
        return self.rule.reason_against(self.experts)


@dataclass(frozen=True)
class Layer:
    """Values that may differ between layers.

    window  number of positions a token attends to, including its own; None for all
    scale   factor of attention scores before the softmax
    mixture  the experts, or None for one feed-forward
    """

    window: int | None
    rope: Rope
    scale: float
    mixture: Mixture | None = None


@dataclass(frozen=True)
class LatentSizes:
    """The widths of multi-head latent attention.

    q_rank   of q's compressed row; 0: q is not compressed
    kv_rank  of the compressed row of k and v
    turned   inputs of a head that are rotated; of k all heads share them
    v_dim    of a head of v
    """

    q_rank: int
    kv_rank: int
    turned: int
    v_dim: int

    def q_outputs(self, architecture: "Architecture") -> int:
        """Outputs of the first product that belong to q."""
        return self.q_rank or architecture.heads * architecture.head_dim


@dataclass(frozen=True)
class Architecture:
    """A decoder's sizes, and the choices of its family.

    norm               "rms" or "layer"; norm_offset is added to stored norm weights (Gemma keeps weight - 1)
    activation         one of GATED_ACTIVATIONS, or an ungated one of quant.kernels.problem
    parallel           True: attention and MLP read the same input, and both outputs are added (GPT-J, NeoX)
    softcap            limits scores to cap * tanh(score / cap); logit_softcap does the same for logits
    positions          True: learned position embeddings are added to the token embeddings
    latent             the widths of multi-head latent attention, or None
    more_layers        layers in the file after the last one, which predict further tokens and are not loaded
    head_norms         False: without the norms of q and k that the family's names have
    joint_head_norms   True: these norms are over all heads of q, or of k, together (OLMoE)
    attention_bias, mlp_bias, head_bias  False: a bias in the file is an error; True or None: it is used
    """

    family: str
    vocabulary: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    max_positions: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    activation: str = "silu_mul"
    parallel: bool = False
    softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    positions: bool = False
    tied: bool = False
    latent: LatentSizes | None = None
    more_layers: int = 0
    head_norms: bool = True
    joint_head_norms: bool = False
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    head_bias: bool | None = None

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    def reason_against(self) -> str | None:
        """The reason why these sizes are invalid, or None."""
        counts = {name: getattr(self, name) for name in SIZES} | {"layers": len(self.layers)}
        wrong = next((name for name, value in counts.items() if type(value) is not int or value < 1), None)
        if wrong is not None:
            return f"{wrong} is {counts[wrong]!r}; a number from 1 is needed"
        if self.head_dim % 2 or self.heads % self.kv_heads:
            return f"{self.heads} heads of {self.head_dim} inputs cannot be even and share {self.kv_heads} of k and v"
        if any(len(layer.rope.frequencies) > self.head_dim // 2 for layer in self.layers):
            return f"its rope turns more than the {self.head_dim} inputs of a head"
        latent = self.latent
        if latent is not None and not (0 < latent.v_dim <= self.head_dim and 0 < latent.turned < self.head_dim):
            return f"heads of {self.head_dim} inputs with v of {latent.v_dim}, {latent.turned} of them rotated"
        if latent is not None and (latent.q_rank < 0 or latent.kv_rank < 1):
            return f"compressed rows of {latent.q_rank} and {latent.kv_rank} numbers"
        if any(layer.window is not None and layer.window < 1 for layer in self.layers):
            return "a window of attention that sees no position"
        mixtures = (layer.mixture.reason_against() for layer in self.layers if layer.mixture is not None)
        wrong = next((reason for reason in mixtures if reason is not None), None)
        if wrong is not None:
            return wrong
        numbers = (
            self.norm_eps,
            self.softcap or 0.0,
            self.logit_softcap or 0.0,
            *(layer.scale for layer in self.layers),
        )
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            return "an eps, softcap or scale of attention that is no finite number"
        return None

    @property
    def short(self) -> int | None:
        """Longest sequence for which the ropes use `frequencies`; None if they always do."""
        return next((layer.rope.short for layer in self.layers if layer.rope.long is not None), None)

    @property
    def o_inputs(self) -> int:
        """Number of inputs of the product behind attention."""
        return self.heads * (self.head_dim if self.latent is None else self.latent.v_dim)

    @property
    def qkv_rows(self) -> int:
        """Number of outputs of the fused qkv product."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class MixtureNames:
    """Names of the tensors of a mixture of experts, which follow those of the layer.

    router       linear with one output for each expert
    correction   what is added to the router's scores for the choice alone, or None
    up, down     linears of expert {}, as in Names; or one for up, whose rows are gate and up by turns
    shared_up, shared_down  linears of the feed-forward that every token passes; none without one
    shared_gate  linear with one output, whose sigmoid multiplies that feed-forward, or None
    """

    router: str = "mlp.gate"
    correction: str | None = None
    up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    down: str = "mlp.experts.{}.down_proj"
    shared_up: tuple[str, ...] = ()
    shared_down: str = ""
    shared_gate: str | None = None


@dataclass(frozen=True)
class LatentNames:
    """Names of the tensors of multi-head latent attention, which follow those of the layer."""

    q: str = "self_attn.q_proj"
    q_a: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_b: str = "self_attn.q_b_proj"
    kv_a: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_b: str = "self_attn.kv_b_proj"


@dataclass(frozen=True)
class Names:
    """A family's tensor names. Names of a layer's tensors follow `layer`. None: the family has no such norm or
    position.

    qkv          linears whose stacked rows are q, k and v
    per_head     True: the rows are q, k and v of head 0, then of head 1, ...
    latent       of architectures with multi-head latent attention
    sinks        a score for each head that takes part in every softmax of attention, without a value
    up           linears whose stacked rows are gate and up, or up alone without a gate
    mixture      of layers with experts; None: the family has none
    transposed   True: dense weights are stored as (k, n)
    ignored      suffixes of tensors that are computed instead of loaded
    others       prefixes of tensors that belong to other parts of the model (vision)
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    per_head: bool = False
    q_norm: str | None = None
    k_norm: str | None = None
    sinks: str | None = None
    latent: LatentNames = LatentNames()
    o: str = "self_attn.o_proj"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_out_norm: str | None = None
    mixture: MixtureNames | None = None
    norm: str = "model.norm"
    head: str = "lm_head"
    transposed: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "attn.bias", "attn.masked_bias")
    others: tuple[str, ...] = ()
