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
    beside   True: the experts are beside the layer's feed-forward, with norms and a router's input of their own
    """

    experts: int
    inner: int
    rule: Rule
    shared: int = 0
    gate: Gate | None = None
    beside: bool = False

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
    head_dim, kv_heads, inner  None: the architecture's
    v_is_k  True: v is the product of k, before its norm and rotation
    source  the layer whose keys and values this one reads; None: it makes its own
    """

    window: int | None
    rope: Rope
    scale: float
    mixture: Mixture | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    inner: int | None = None
    v_is_k: bool = False
    source: int | None = None


@dataclass(frozen=True)
class HeadSizes:
    """The heads of a layer's attention.

    heads, kv_heads  of q, and of k and v
    head_dim         inputs of a head
    made             heads of k, and of v, that the layer makes: none if it reads those of another one
    """

    heads: int
    kv_heads: int
    head_dim: int
    made: int

    @property
    def qkv_rows(self) -> int:
        """Number of outputs of the fused qkv product."""
        return (self.heads + 2 * self.made) * self.head_dim


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
class TokenInputSizes:
    """The width of the input that each layer has of its own for each token, and the tokens of its lookup: all of the
    model's, or more."""

    width: int
    vocabulary: int


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
    value_norms        True: heads of v have an RMS norm without a weight (Gemma 4)
    token_inputs       sizes of the input that each layer has of its own for each token (Gemma 4), or None
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
    value_norms: bool = False
    token_inputs: TokenInputSizes | None = None
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
        wrong = next(
            (reason for index in range(len(self.layers)) if (reason := self.reason_against_heads(index))), None
        )
        if wrong is not None:
            return wrong
        latent = self.latent
        if latent is not None and not (0 < latent.v_dim <= self.head_dim and 0 < latent.turned < self.head_dim):
            return f"heads of {self.head_dim} inputs with v of {latent.v_dim}, {latent.turned} of them rotated"
        if latent is not None and (latent.q_rank < 0 or latent.kv_rank < 1):
            return f"compressed rows of {latent.q_rank} and {latent.kv_rank} numbers"
        inputs = self.token_inputs
        if inputs is not None and not (inputs.width > 0 and inputs.vocabulary >= self.vocabulary):
            return f"inputs of layers of width {inputs.width} for {inputs.vocabulary} of {self.vocabulary} tokens"
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

    def reason_against_heads(self, index: int) -> str | None:
        """The reason why the heads of a layer are invalid, or None."""
        layer, sizes = self.layers[index], self.heads_of(index)
        for name, value in (
            ("head_dim", sizes.head_dim),
            ("kv_heads", sizes.kv_heads),
            ("inner", self.inner_of(index)),
        ):
            if type(value) is not int or value < 1:
                return f"{name} of layer {index} is {value!r}; a number from 1 is needed"
        if sizes.head_dim % 2 or sizes.heads % sizes.kv_heads:
            return (
                f"{sizes.heads} heads of {sizes.head_dim} inputs cannot be even and share {sizes.kv_heads} of k and v"
            )
        if len(layer.rope.frequencies) > sizes.head_dim // 2:
            return f"its rope turns more than the {sizes.head_dim} inputs of a head"
        source = layer.source
        if source is None:
            return None
        if not 0 <= source < index or self.layers[source].source is not None:
            return f"layer {index} reads the keys and values of layer {source}, which makes none before it"
        theirs = self.heads_of(source)
        if (theirs.kv_heads, theirs.head_dim) != (sizes.kv_heads, sizes.head_dim):
            return f"layers {source} and {index} share keys and values of different shapes"
        return None

    def heads_of(self, index: int) -> HeadSizes:
        """The heads of a layer."""
        layer = self.layers[index]
        kv_heads = self.kv_heads if layer.kv_heads is None else layer.kv_heads
        head_dim = self.head_dim if layer.head_dim is None else layer.head_dim
        return HeadSizes(self.heads, kv_heads, head_dim, kv_heads if layer.source is None else 0)

    def inner_of(self, index: int) -> int:
        """The inner size of a layer's feed-forward of all tokens."""
        inner = self.layers[index].inner
        return self.inner if inner is None else inner

    @property
    def short(self) -> int | None:
        """Longest sequence for which the ropes use `frequencies`; None if they always do."""
        return next((layer.rope.short for layer in self.layers if layer.rope.long is not None), None)

    def o_inputs(self, index: int) -> int:
        """Number of inputs of the product behind a layer's attention."""
        return self.heads * (self.heads_of(index).head_dim if self.latent is None else self.latent.v_dim)


@dataclass(frozen=True)
class MixtureNames:
    """Names of the tensors of a mixture of experts, which follow those of the layer.

    router       linear with one output for each expert
    router_scale factor of the router's input, which then has an RMS norm of its own and is divided by the square root
                 of its width; or None
    correction   what is added to the router's scores for the choice alone, or None
    factors      factors of the weights of a row's experts, or None
    expert_norm, expert_out_norm, dense_out_norm  of experts beside a feed-forward: before and behind them, and behind
                 the feed-forward
    up, down     linears of expert {}, as in Names; or one for up, whose rows are gate and up by turns
    up_whole, down_whole  tensors (experts, n, k) of all experts, gate above up, that a file may have instead; or None
    shared_up, shared_down  linears of the feed-forward that every token passes; none without one
    shared_gate  linear with one output, whose sigmoid multiplies that feed-forward, or None
    """

    router: str = "mlp.gate"
    router_scale: str | None = None
    correction: str | None = None
    factors: str | None = None
    expert_norm: str | None = None
    expert_out_norm: str | None = None
    dense_out_norm: str | None = None
    up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    down: str = "mlp.experts.{}.down_proj"
    up_whole: str | None = None
    down_whole: str | None = None
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
class TokenInputNames:
    """Names of the tensors of the inputs that layers have of their own.

    embedding, projection, norm  of the model: a lookup of all layers' inputs, and what is added to it of the embedding
    token_gate, token_onto, token_out_norm  follow those of the layer
    """

    embedding: str = "model.embed_tokens_per_layer"
    projection: str = "model.per_layer_model_projection"
    norm: str = "model.per_layer_projection_norm"
    token_gate: str = "per_layer_input_gate"
    token_onto: str = "per_layer_projection"
    token_out_norm: str = "post_per_layer_input_norm"


@dataclass(frozen=True)
class Names:
    """A family's tensor names. Names of a layer's tensors follow `layer`. None: the family has no such norm or
    position.

    qkv          linears whose stacked rows are q, k and v
    per_head     True: the rows are q, k and v of head 0, then of head 1, ...
    latent       of architectures with multi-head latent attention
    sinks        a score for each head that takes part in every softmax of attention, without a value
    up           linears whose stacked rows are gate and up, or up alone without a gate
    factor       one number that multiplies the layer's output
    token_inputs of architectures whose layers have inputs of their own
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
    factor: str | None = None
    token_inputs: TokenInputNames = TokenInputNames()
    mixture: MixtureNames | None = None
    norm: str = "model.norm"
    head: str = "lm_head"
    transposed: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "attn.bias", "attn.masked_bias")
    others: tuple[str, ...] = ()

    def of(self, part: str) -> str | tuple[str, ...] | None:
        """The names of a layer's part: one of these, or of a mixture's, or of an input of its own."""
        home: object = self
        if part.startswith(("shared_", "expert_", "dense_")):
            home = self.mixture
        elif part.startswith("token_"):
            home = self.token_inputs
        found: str | tuple[str, ...] | None = getattr(home, part)
        return found
