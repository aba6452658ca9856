"""The model families that are written as GGUF: their architecture there, and their tensors' names in both worlds.

A name of transformers is a stem and `.weight` or `.bias`; so is a name in GGUF. The experts of a layer are one tensor
in GGUF, and a row of a table here has `*` for the expert's number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import CheckpointError

EMBEDDINGS, HEAD = "token_embd", "output"
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
LLAMA = ATTENTION | {"post_attention_layernorm": "ffn_norm"} | MLP
EXPERTS = {f"mlp.experts.*.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}
SHARED = {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
SHARED |= {f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
ROUTER = {"mlp.gate": "ffn_gate_inp"}
MIXTRAL = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.*.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.*.w2": "ffn_down_exps",
    "block_sparse_moe.experts.*.w3": "ffn_up_exps",
}
GEMMA = (
    ATTENTION
    | MLP
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)
PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOP = {"model.embed_tokens": EMBEDDINGS, "model.norm": "output_norm", "lm_head": HEAD}
GPT2_TOP = {
    "transformer.wte": EMBEDDINGS,
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": HEAD,
}
TANH = ("gelu_pytorch_tanh",)
UNUSED = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")  # buffers that old checkpoints have


@dataclass(frozen=True)
class Family:
    """A family of models.

    kinds       model_type in config.json, one or several
    arch        general.architecture in GGUF
    inside      names of a block's parts: transformers' -> GGUF's
    top         names outside the blocks
    blocks      transformers' prefix of a block's number
    turned      True if the rows of q and k are in the order of Meta's rotary embedding in GGUF: pairs of neighbours
    raised      added to the weights of norms, which transformers adds when it computes
    transposed  True if transformers has matrices (k, n) (Conv1D)
    activations of the MLP that llama.cpp computes for this architecture
    """

    kinds: tuple[str, ...]
    arch: str
    inside: Mapping[str, str]
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    blocks: str = "model.layers"
    turned: bool = False
    raised: float = 0.0
    transposed: bool = False
    activations: tuple[str, ...] = ("silu",)


FAMILIES = (
    Family(("llama", "mistral"), "llama", LLAMA, turned=True),
    Family(("mixtral",), "llama", {**ATTENTION, "post_attention_layernorm": "ffn_norm", **MIXTRAL}, turned=True),
    Family(("qwen2",), "qwen2", LLAMA),
    Family(("qwen2_moe",), "qwen2moe", LLAMA | ROUTER | EXPERTS | SHARED),
    Family(("qwen3",), "qwen3", LLAMA | HEAD_NORMS),
    Family(("qwen3_moe",), "qwen3moe", LLAMA | HEAD_NORMS | ROUTER | EXPERTS),
    Family(("gemma2",), "gemma2", GEMMA, raised=1.0, activations=TANH),
    Family(("gemma3_text",), "gemma3", GEMMA | HEAD_NORMS, raised=1.0, activations=TANH),
    Family(("phi3",), "phi3", PHI3),
    Family(
        ("gpt2",),
        "gpt2",
        GPT2,
        GPT2_TOP,
        "transformer.h",
        transposed=True,
        activations=("gelu_new", *TANH),
    ),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of the model with this config.json. CheckpointError names those that are written."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if kind in family.kinds:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.kinds)
    raise CheckpointError(f"no GGUF is written of the model type {str(kind)[:40]!r}; those that are: {known}")


@dataclass(frozen=True)
class Place:
    """A tensor's place in GGUF.

    name    its name there
    part    its last part, without `.weight` or `.bias` ("attn_q")
    layer   its block; None outside
    expert  its number in a tensor of all experts; None for a tensor of its own
    """

    name: str
    part: str
    layer: int | None = None
    expert: int | None = None


def place_of(family: Family, name: str) -> Place | None:
    """The place of transformers' tensor `name`, or None if GGUF has none for it."""
    stem, _, kind = name.rpartition(".")
    found = re.fullmatch(rf"{re.escape(family.blocks)}\.(\d+)\.(.+)", stem)
    if found is None:
        part = family.top.get(stem)
        return None if part is None else Place(f"{part}.{kind}", part)
    expert = re.search(r"\.experts\.(\d+)\.", stem)
    part = family.inside.get(re.sub(r"\.experts\.\d+\.", ".experts.*.", found[2]))
    if part is None:
        return None
    return Place(f"blk.{found[1]}.{part}.{kind}", part, int(found[1]), None if expert is None else int(expert[1]))


def linears_at(family: Family, name: str, experts: int) -> list[str]:
    """transformers' names, without `.weight`, of the tensor or of all experts in GGUF's tensor `name`; empty for an
    unknown one. The inverse of `place_of`."""
    stem = name.rpartition(".")[0]
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if found is None:
        return [theirs for theirs, ours in family.top.items() if ours == stem]
    leaf = next((theirs for theirs, ours in family.inside.items() if ours == found[2]), None)
    if leaf is None:
        return []
    prefix = f"{family.blocks}.{found[1]}."
    return [prefix + leaf.replace("*", str(i)) for i in range(experts)] if "*" in leaf else [prefix + leaf]
