"""Architecture of a decoder: the numbers that affect its computation, and the names of its tensors in a file."""

import math
from dataclasses import dataclass

from torch import Tensor

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
class Layer:
    """Values that may differ between layers.

    window  number of positions a token attends to, including its own; None for all
    scale   factor of attention scores before the softmax
    """

    window: int | None
    rope: Rope
    scale: float


@dataclass(frozen=True)
class Architecture:
    """A decoder's sizes, and the choices of its family.

    norm               "rms" or "layer"; norm_offset is added to stored norm weights (Gemma keeps weight - 1)
    activation         one of GATED_ACTIVATIONS, or an ungated one of quant.kernels.problem
    parallel           True: attention and MLP read the same input, and both outputs are added (GPT-J, NeoX)
    softcap            limits scores to cap * tanh(score / cap); logit_softcap does the same for logits
    positions          True: learned position embeddings are added to the token embeddings
    attention_bias, mlp_bias  False: a bias in the file is an error; True or None: it is used
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
    attention_bias: bool | None = None
    mlp_bias: bool | None = None

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
        if any(layer.window is not None and layer.window < 1 for layer in self.layers):
            return "a window of attention that sees no position"
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
    def qkv_rows(self) -> int:
        """Number of outputs of the fused qkv product."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Names:
    """A family's tensor names. Names of a layer's tensors follow `layer`. None: the family has no such norm or
    position.

    qkv          linears whose stacked rows are q, k and v
    per_head     True: the rows are q, k and v of head 0, then of head 1, ...
    up           linears whose stacked rows are gate and up, or up alone without a gate
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
    o: str = "self_attn.o_proj"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_out_norm: str | None = None
    norm: str = "model.norm"
    head: str = "lm_head"
    transposed: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "attn.bias", "attn.masked_bias")
    others: tuple[str, ...] = ()
