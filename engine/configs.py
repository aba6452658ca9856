"""Configurations of the engine's families: the fields of config.json that change what a model computes.

A class has the fields of a family's class in transformers, with the same values for those that a file leaves out. The
classes stand here because an import of transformers' takes over a second: its checks of fields need torch's compiler.
tests/engine/test_configs.py compares both.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from lowbit.arguments import hints_of, require_type
from lowbit.engine.fields import NotComputed

FULL, SLIDING = "full_attention", "sliding_attention"
FORMER_KINDS = {"attention": FULL}  # layer types of older files
WITH_LENGTH = ("llama3", "yarn", "longrope")  # rope types that know the longest sequence of training


Aliases = tuple[tuple[str, str], ...]


@dataclass
class Config:
    """Fields of all families.

    aliases  other names of fields in files
    """

    aliases: ClassVar[Aliases] = ()
    model_type: str = ""
    tie_word_embeddings: bool | None = False
    is_encoder_decoder: bool = False
    is_causal: bool = True
    per_layer_config: Any = None

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Self:
        """The configuration that config.json holds. NotComputed for a value of another type."""
        names = {field.name for field in fields(cls)}
        found = {name: value for name, value in plain.items() if name in names}
        found |= {name: plain[alias] for alias, name in cls.aliases if alias in plain}
        config = cls(**deepcopy(found))
        kind: type = cls
        hints = hints_of(kind)
        for name in names:
            require_type(name, getattr(config, name), hints[name], NotComputed)
        config.resolve()
        return config

    def resolve(self) -> None:
        """Give fields that a file may leave open their values."""

    def get_text_config(self) -> "Config":
        """The part of the model that writes text."""
        return self


@dataclass
class Roped(Config):
    """Fields of families with rotary embeddings. Older files have rope_theta and its like instead of rope_parameters.

    theta, turned  rope_theta and partial_rotary_factor of a file without them; None: there is no such factor
    """

    theta: ClassVar[float] = 10000.0
    turned: ClassVar[float | None] = None
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None

    def resolve(self) -> None:
        self.rope_parameters = self.rope_scaling or self.rope_parameters or {}
        for rope in self.ropes():
            self.complete(rope)

    def ropes(self) -> list[dict[str, Any]]:
        """The parameters of each rope: one, or one for each type of layer."""
        assert self.rope_parameters is not None
        kinds = getattr(self, "layer_types", None) or ()
        nested = [rope for kind, rope in self.rope_parameters.items() if kind in kinds and rope is not None]
        return nested or [self.rope_parameters]

    def complete(self, rope: dict[str, Any]) -> None:
        """Add to a rope's parameters what the file has elsewhere, or leaves out."""
        rope.setdefault("rope_theta", self.theta if self.rope_theta is None else self.rope_theta)
        share = self.turned if self.partial_rotary_factor is None else self.partial_rotary_factor
        if share is not None:
            rope.setdefault("partial_rotary_factor", share)
        rope.setdefault("rope_type", rope.get("type", "default"))
        if rope["rope_type"] not in WITH_LENGTH:
            return
        if rope is self.rope_parameters and self.original_max_position_embeddings is not None:
            rope["original_max_position_embeddings"] = self.original_max_position_embeddings
        rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)


@dataclass
class LlamaLike(Roped):
    """Fields of all families built like Llama."""

    vocab_size: int = 32000
    intermediate_size: int = 11008
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6

    def resolve(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        super().resolve()


@dataclass
class WithTypes(LlamaLike):
    """Fields of families whose layers differ in what they attend to."""

    layer_types: list[str] | None = None
    sliding_window: int | None = 4096

    def resolve(self) -> None:
        kinds = self.usual_types() if self.layer_types is None else self.layer_types
        self.layer_types = [FORMER_KINDS.get(kind, kind) for kind in kinds]
        if len(self.layer_types) != self.num_hidden_layers:
            raise NotComputed(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")
        unknown = set(self.layer_types) - {FULL, SLIDING}
        if unknown:
            raise NotComputed(f"layer_types has {min(unknown)!r}; the engine knows {FULL} and {SLIDING}")
        super().resolve()

    def usual_types(self) -> list[str]:
        """The types of layers in a file without them: every second one has a window."""
        return [FULL if index % 2 else SLIDING for index in range(self.num_hidden_layers)]


@dataclass
class Llama(LlamaLike):
    """Fields of Llama 2 and 3."""

    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass
class Mistral(LlamaLike):
    """Fields of Mistral, whose layers all have a window."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096


@dataclass
class Qwen2(WithTypes):
    """Fields of Qwen2: the last layers have windows, if any."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    max_window_layers: int = 28

    def resolve(self) -> None:
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        super().resolve()

    def usual_types(self) -> list[str]:
        narrow = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
        return [FULL if index < narrow else SLIDING for index in range(self.num_hidden_layers)]


@dataclass
class Qwen3(Qwen2):
    """Fields of Qwen3."""

    head_dim: int | None = 128
    attention_bias: bool = False


@dataclass
class Experts(LlamaLike):
    """Fields of families with experts."""

    num_experts_per_tok: int | None = 2


@dataclass
class Mixtral(Experts):
    """Fields of Mixtral."""

    aliases: ClassVar[Aliases] = (("num_experts", "num_local_experts"),)
    theta = 1e6
    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    num_local_experts: int = 8


@dataclass
class PhiMoe(Mixtral):
    """Fields of Phi-MoE."""

    aliases: ClassVar[Aliases] = ()
    vocab_size: int = 32064
    intermediate_size: int = 6400
    num_local_experts: int = 16
    router_jitter_noise: float = 0.01
    attention_bias: bool = False
    lm_head_bias: bool = False


@dataclass
class QwenMoe(Experts):
    """Fields of Qwen's families with experts."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: int = 1
    norm_topk_prob: bool = False
    mlp_only_layers: list[int] | None = None

    def resolve(self) -> None:
        self.mlp_only_layers = self.mlp_only_layers or []
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        super().resolve()


@dataclass
class Qwen2Moe(QwenMoe, WithTypes):
    """Fields of Qwen2-MoE."""

    intermediate_size: int = 5632
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_window_layers: int = 28
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts_per_tok: int | None = 4
    num_experts: int = 60
    qkv_bias: bool = True

    def resolve(self) -> None:
        super().resolve()
        self.sliding_window = self.sliding_window or 0

    def usual_types(self) -> list[str]:
        wide = self.max_window_layers if self.use_sliding_window else 0
        return [SLIDING if index < wide and not index % 2 else FULL for index in range(self.num_hidden_layers)]


@dataclass
class Qwen3Moe(QwenMoe):
    """Fields of Qwen3-MoE."""

    aliases: ClassVar[Aliases] = (("num_local_experts", "num_experts"),)
    intermediate_size: int = 6144
    num_key_value_heads: int | None = 4
    attention_bias: bool = False
    moe_intermediate_size: int = 768
    num_experts_per_tok: int | None = 8
    num_experts: int = 128


@dataclass
class Olmoe(Experts):
    """Fields of OLMoE."""

    aliases: ClassVar[Aliases] = (("num_local_experts", "num_experts"),)
    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    clip_qkv: float | None = None
    num_experts_per_tok: int | None = 8
    num_experts: int = 64
    norm_topk_prob: bool = False


@dataclass
class AfterDense(Experts):
    """Fields of families with experts behind their first layers, which are dense."""

    aliases: ClassVar[Aliases] = (
        ("num_local_experts", "n_routed_experts"),
        ("num_nextn_predict_layers", "num_mtp_layers"),
    )
    attention_bias: bool = False
    first_k_dense_replace: int | None = 1
    n_group: int | None = 1
    topk_group: int | None = 1
    n_routed_experts: int = 128
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool | None = True
    moe_intermediate_size: int = 1408
    num_experts_per_tok: int | None = 8


@dataclass
class Deepseek(AfterDense):
    """Fields of families with latent attention."""

    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    def resolve(self) -> None:
        self.head_dim = self.qk_rope_head_dim
        super().resolve()


@dataclass
class DeepseekV2(Deepseek):
    """Fields of DeepSeek-V2."""

    aliases: ClassVar[Aliases] = (("num_experts", "n_routed_experts"),)
    vocab_size: int = 102400
    mlp_bias: bool = False
    first_k_dense_replace: int | None = 0
    n_group: int | None = None
    topk_group: int | None = None
    topk_method: str | None = "greedy"
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    norm_topk_prob: bool | None = False
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1407


@dataclass
class DeepseekV3(Deepseek):
    """Fields of DeepSeek-V3 and R1."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = 128
    max_position_embeddings: int = 4096
    first_k_dense_replace: int | None = 3
    n_group: int | None = 8
    topk_group: int | None = 4
    n_routed_experts: int = 256
    routed_scaling_factor: float = 2.5
    moe_intermediate_size: int = 2048
    rope_interleave: bool | None = True
    num_mtp_layers: int = 1


@dataclass
class Glm4Moe(AfterDense):
    """Fields of GLM-4.5."""

    turned = 0.5
    vocab_size: int = 151552
    intermediate_size: int = 10944
    num_hidden_layers: int = 46
    num_attention_heads: int = 96
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    use_qk_norm: bool = False
    num_mtp_layers: int = 1


@dataclass
class GptOss(Experts, WithTypes):
    """Fields of gpt-oss, whose rope is YaRN's if the file has none."""

    aliases: ClassVar[Aliases] = (("num_experts", "num_local_experts"),)
    theta = 150000.0
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 128
    num_experts_per_tok: int | None = 4
    num_local_experts: int = 128
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    attention_bias: bool = True

    def resolve(self) -> None:
        if self.rope_parameters is None:
            yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
            self.rope_parameters = yarn | {"original_max_position_embeddings": 4096}
        super().resolve()


@dataclass
class Gemma2(WithTypes):
    """Fields of Gemma 2."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool | None = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: bool | None = None


@dataclass
class Gemma3Text(Gemma2):
    """Fields of Gemma 3, with a rope for each type of layer."""

    theta = 1e6
    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = False
    rope_local_base_freq: float = 10000.0
    sliding_window_pattern: int = 6

    def resolve(self) -> None:
        ropes = self.rope_parameters or {}
        ropes[FULL] = (ropes.get(FULL) or {}) | (self.rope_scaling or {})
        ropes[SLIDING] = {"rope_theta": self.rope_local_base_freq} | (ropes.get(SLIDING) or {})
        self.rope_parameters, self.rope_scaling = ropes, None
        super().resolve()

    def ropes(self) -> list[dict[str, Any]]:
        assert self.rope_parameters is not None
        return [self.rope_parameters[FULL], self.rope_parameters[SLIDING]]

    def usual_types(self) -> list[str]:
        layers = range(1, self.num_hidden_layers + 1)
        return [SLIDING if layer % self.sliding_window_pattern else FULL for layer in layers]


@dataclass
class Gemma3(Config):
    """Fields of Gemma 3 with images, whose text part counts here."""

    tie_word_embeddings: bool | None = True
    text_config: dict[str, Any] | None = None

    def get_text_config(self) -> Config:
        return Gemma3Text.read({"model_type": "gemma3_text"} | (self.text_config or {}))


@dataclass(frozen=True)
class HeadFields:
    """The fields of a layer's heads."""

    head_dim: int | None
    num_key_value_heads: int | None


@dataclass
class Gemma4UnifiedText(WithTypes):
    """Fields of Gemma 4 with one encoder of images and sound.

    per_layer_config  in a file the fields in which a layer differs, by its index, which older files have as the global_
                      fields of all layers with full attention; then the HeadFields of every layer
    """

    vocab_size: int = 262144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 262144
    tie_word_embeddings: bool | None = True
    attention_bias: bool = False
    sliding_window: int | None = 1024
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: str | None = "vision"
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    global_head_dim: int | None = 512
    num_global_key_value_heads: int | None = None

    def resolve(self) -> None:
        if self.rope_parameters is None:
            full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
            self.rope_parameters = {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: full}
        super().resolve()
        assert self.layer_types is not None
        self.layer_types[-1:] = [FULL] * bool(self.layer_types)
        if self.per_layer_config is None:
            own: dict[str, Any] = {"head_dim": self.global_head_dim}
            if self.attention_k_eq_v and self.num_global_key_value_heads is not None:
                own["num_key_value_heads"] = self.num_global_key_value_heads
            self.per_layer_config = {str(index): own for index, kind in enumerate(self.layer_types) if kind == FULL}
        require_type("per_layer_config", self.per_layer_config, dict[str, dict[str, int]], NotComputed)
        self.per_layer_config = [self.heads_of(index) for index in range(self.num_hidden_layers)]

    def heads_of(self, index: int) -> HeadFields:
        """The heads of a layer. NotComputed if something else differs there."""
        own = {"head_dim": self.head_dim, "num_key_value_heads": self.num_key_value_heads}
        changes = self.per_layer_config.get(str(index), {})
        unknown = set(changes) - set(own)
        if unknown:
            raise NotComputed(f"layer {index} has its own {min(unknown)}; the engine knows {', '.join(own)}")
        return HeadFields(**own | changes)

    def usual_types(self) -> list[str]:
        return [SLIDING if layer % 6 else FULL for layer in range(1, self.num_hidden_layers + 1)]


@dataclass
class Gemma4Text(Gemma4UnifiedText):
    """Fields of Gemma 4, which may have experts, and inputs of each layer's own."""

    max_position_embeddings: int = 131072
    sliding_window: int | None = 512
    use_bidirectional_attention: str | None = None
    vocab_size_per_layer_input: int = 262144
    hidden_size_per_layer_input: int = 256
    enable_moe_block: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None


@dataclass
class Gemma4(Config):
    """Fields of Gemma 4 with images and sound, whose text part counts here."""

    tie_word_embeddings: bool | None = True
    text_config: dict[str, Any] | None = None

    def get_text_config(self) -> Config:
        return Gemma4Text.read({"model_type": "gemma4_text"} | (self.text_config or {}))


@dataclass
class Gemma4Unified(Gemma4):
    """The same with one encoder of both."""

    def get_text_config(self) -> Config:
        return Gemma4UnifiedText.read({"model_type": "gemma4_unified_text"} | (self.text_config or {}))


@dataclass
class Phi3(LlamaLike):
    """Fields of Phi-3 and Phi-4."""

    turned = 1.0
    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int | None = 4096
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None

    def complete(self, rope: dict[str, Any]) -> None:
        rope.setdefault("rope_type", rope.get("type", "default"))
        if rope["rope_type"] in ("su", "yarn"):  # names of longrope in older files
            rope["rope_type"] = "longrope"
        super().complete(rope)


@dataclass
class Glm(LlamaLike):
    """Fields of GLM-4."""

    turned = 0.5
    vocab_size: int = 151552
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1.5625e-7
    attention_bias: bool = True


@dataclass
class Gpt(Config):
    """Fields of GPT-2 and GPT-J."""

    aliases: ClassVar[Aliases] = (
        ("hidden_size", "n_embd"),
        ("max_position_embeddings", "n_positions"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    )
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5


@dataclass
class Gpt2(Gpt):
    """Fields of GPT-2."""

    tie_word_embeddings: bool | None = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False


@dataclass
class GptJ(Gpt):
    """Fields of GPT-J."""

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int | None = 64


@dataclass
class GptNeoX(Roped):
    """Fields of GPT-NeoX and Pythia."""

    aliases: ClassVar[Aliases] = (("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor"))
    turned = 0.25
    vocab_size: int = 50432
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True


@dataclass
class ChatGLM(Config):
    """ChatGLM's fields; transformers has no class of its own for them. Biases are used if the file has them."""

    model_type: str = "chatglm"
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_layers: int = 28
    num_attention_heads: int = 32
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    kv_channels: int = 128
    seq_length: int = 2048
    layernorm_epsilon: float = 1e-5
    rope_ratio: float = 1
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    original_rope: bool = True
    interleaved_qkv: bool = False
    pre_seq_len: int | None = None
    quantization_bit: int = 0
