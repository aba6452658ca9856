"""A GGUF file alone as a model: config.json and the tokenizer's files, made from its keys.

Files of other programs have no config.json beside them. The keys have all that it says, of the families that are
written; `hyper.py` and `tokens.py` are the way there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.files import write_text
from lowbit.export.gguf.file import Header
from lowbit.export.gguf.hyper import query_scalar_of
from lowbit.export.gguf.tokens import BYTE, CONTROL, NORMAL, PHI, PHI_KEEPS, SPACE, SPLITS, UNKNOWN, USER_DEFINED
from lowbit.export.plain import write_json
from lowbit.export.sharded import CONFIG_NAME

KINDS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
}
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
UNREADABLE = ("rope.scaling.type", "rope_freqs.weight", "rope_factors_long.weight")


def unpack(header: Header, directory: Path) -> None:
    """Write config.json and the tokenizer's files of a GGUF into `directory`.

    CheckpointError if the file lacks a key, is of another family, or has a rotary embedding that is not read from keys.
    """
    try:
        config = _config(header)
        write_json(directory / CONFIG_NAME, config)
        _write_tokenizer(header.keys, directory)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{header.path}: its keys make no model ({error!r})") from error


def _config(header: Header) -> dict[str, Any]:
    keys, arch = header.keys, str(header.keys.get("general.architecture"))
    if arch not in KINDS:
        raise CheckpointError(f"{header.path}: the architecture {arch[:40]!r}; those read are {', '.join(KINDS)}")
    scaled = [key for key in UNREADABLE if f"{arch}.{key}" in keys or key in header.tensors]
    if scaled:
        raise CheckpointError(
            f"{header.path}: its rotary embedding is scaled ({scaled[0]}), which GGUF has in another form; put the "
            f"model's {CONFIG_NAME} and tokenizer.json beside the file and name the directory"
        )
    own = {key.removeprefix(f"{arch}."): value for key, value in keys.items() if key.startswith(f"{arch}.")}
    table = GPT2 if arch == "gpt2" else COMMON
    config = {theirs: own[ours] for ours, theirs in table.items() if ours in own}
    kind, name = KINDS[arch]
    experts = own.get("expert_count", 0)
    if arch == "llama" and experts:
        kind, name, config["num_local_experts"] = "mixtral", "MixtralForCausalLM", experts
    elif experts:
        config["num_experts"] = experts
    config |= {"model_type": kind, "architectures": [name], "vocab_size": _rows(header)}
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    for part in ("bos", "eos", "padding"):
        if f"tokenizer.ggml.{part}_token_id" in keys:
            config[f"{part.replace('padding', 'pad')}_token_id"] = keys[f"tokenizer.ggml.{part}_token_id"]
    return config | _of_family(arch, own, header, config) | ({} if arch == "gpt2" else _rope(arch, own))


def _rows(header: Header) -> int:
    if "token_embd.weight" not in header.tensors:
        raise ValueError("no tensor token_embd.weight")
    return header.tensors["token_embd.weight"].shape[0]


def _rope(arch: str, own: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    if arch != "gemma3":
        return {"rope_parameters": plain}
    local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
    return {"rope_parameters": {"full_attention": plain, "sliding_attention": local}}


def _of_family(arch: str, own: Mapping[str, Any], header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an architecture of GGUF implies."""
    biased = "blk.0.attn_q.bias" in header.tensors
    if arch.startswith("gemma"):
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": own.get("attention.sliding_window"),
            "query_pre_attn_scalar": query_scalar_of(config, arch),
        }
    if arch == "phi3":
        return {"sliding_window": own.get("attention.sliding_window") or None, "hidden_act": "silu"}
    known: dict[str, dict[str, Any]] = {
        "qwen3moe": {"norm_topk_prob": True, "hidden_act": "silu"},
        "llama": {"attention_bias": biased, "hidden_act": "silu", "mlp_bias": "blk.0.ffn_up.bias" in header.tensors},
        "gpt2": {"activation_function": "gelu_new"},
    }
    return known.get(arch, {"hidden_act": "silu"})


def _write_tokenizer(keys: Mapping[str, Any], directory: Path) -> None:
    """tokenizer.json, its configuration and the chat template."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items() if key.startswith("tokenizer.")}
    texts, types = ggml["tokens"], ggml.get("token_type") or [NORMAL] * len(ggml["tokens"])
    model = _byte_level(ggml) if ggml["model"] == "gpt2" else _sentencepiece(ggml, types)
    strips = PHI.search(str(keys.get("general.name"))) is not None
    added = [
        {"id": place, "content": text, "single_word": False, "lstrip": False,
         "rstrip": strips and text not in PHI_KEEPS, "normalized": False, "special": kind != USER_DEFINED}
        for place, (text, kind) in enumerate(zip(texts, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    names = {part: texts[ggml[f"{key}_token_id"]] for part, key in _SPECIALS if ggml.get(f"{key}_token_id") is not None}
    write_json(directory / "tokenizer.json", {"version": "1.0", "added_tokens": added} | model | _ends(ggml, texts))
    settings = {f"{part}_token": text for part, text in names.items()}
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    if isinstance(keys.get("tokenizer.chat_template"), str):
        write_text(directory / "chat_template.jinja", keys["tokenizer.chat_template"])


_SPECIALS = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))


def _ends(ggml: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    """The step that puts special tokens around every text, if the file asks for it."""
    asked = {"bos": ggml.get("add_bos_token", ggml["model"] == "llama"), "eos": ggml.get("add_eos_token", False)}
    places = [ggml.get(f"{key}_token_id") if wanted else None for key, wanted in asked.items()]
    if places == [None, None]:
        return {"post_processor": None}
    before, after = ([] if place is None else [texts[place]] for place in places)
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    special = {
        texts[place]: {"id": texts[place], "ids": [place], "tokens": [texts[place]]}
        for place in places
        if place is not None
    }
    parts = [[{"SpecialToken": {"id": text, "type_id": 0}} for text in side] for side in (before, after)]
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*parts[0], first, *parts[1]],
            "pair": [*parts[0], first, second, *parts[1]],
            "special_tokens": special,
        }
    }


def _byte_level(ggml: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE, but for its added tokens."""
    named = {name: split for split, name in SPLITS.items()}
    pre = ggml.get("pre", "default")
    if pre not in named:
        raise ValueError(f"its split into words is {pre!r}; those read are {', '.join(named)}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [_step(step) for step in named[pre]]
    regex = named[pre][-1] == "words"
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [step for step in steps if step] + [byte_level | {"use_regex": regex}],
        },
        "decoder": byte_level | {"use_regex": regex},
        "model": {
            "type": "BPE",
            "vocab": {text: place for place, text in enumerate(ggml["tokens"])},
            "merges": [pair.split(" ", 1) for pair in ggml["merges"]],
            "ignore_merges": pre in ("llama-bpe", "tekken"),
        },
    }


def _step(step: str) -> dict[str, Any] | None:
    if step == "words":
        return None
    if step == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _sentencepiece(ggml: Mapping[str, Any], types: list[int]) -> dict[str, Any]:
    """A tokenizer.json of SentencePiece's BPE, but for its added tokens. Each way to make a token of two is a merge."""
    texts, scores = ggml["tokens"], ggml["scores"]
    plain = {text for text, kind in zip(texts, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    order = sorted((-score, place) for place, score in enumerate(scores) if types[place] == NORMAL)
    merges = [
        [texts[place][:cut], texts[place][cut:]]
        for _, place in order
        for cut in range(1, len(texts[place]))
        if texts[place][:cut] in plain and texts[place][cut:] in plain
    ]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if ggml.get("add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if ggml.get("add_space_prefix", True):
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((text for text, kind in zip(texts, types, strict=True) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "vocab": {text: place for place, text in enumerate(texts)}, "merges": merges,
            "byte_fallback": BYTE in types, "fuse_unk": True, "unk_token": unknown, "ignore_merges": False,
        },
    }  # fmt: skip
