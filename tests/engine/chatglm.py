"""ChatGLM2's computation in plain torch, for tests: transformers has no class of its own for these files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tests.builders import VOCABULARY

HEADS, HEAD_DIM, GROUPS, INNER, LAYERS, HIDDEN = 4, 16, 2, 96, 2, 64


class TinyChatGLM:
    """A random model: RMS norms, one product for q, k and v with bias, the first half of a head turned by pairs."""

    def __init__(self, multi_query: bool) -> None:
        self.kv_heads = GROUPS if multi_query else HEADS
        self.multi_query = multi_query
        generator = torch.Generator().manual_seed(0)
        layer = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attention.query_key_value.weight": ((HEADS + 2 * self.kv_heads) * HEAD_DIM, HIDDEN),
            "self_attention.query_key_value.bias": ((HEADS + 2 * self.kv_heads) * HEAD_DIM,),
            "self_attention.dense.weight": (HIDDEN, HEADS * HEAD_DIM),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
            "mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
        }
        layers = [f"transformer.encoder.layers.{i}." for i in range(LAYERS)]
        shapes = {prefix + name: shape for prefix in layers for name, shape in layer.items()}
        shapes |= {
            "transformer.embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
            "transformer.encoder.final_layernorm.weight": (HIDDEN,),
            "transformer.output_layer.weight": (VOCABULARY, HIDDEN),
        }
        self.tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def save(self, directory: Path) -> None:
        """The model as ChatGLM2's files have it."""
        config = {
            "model_type": "chatglm",
            "padded_vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": INNER,
            "num_attention_heads": HEADS,
            "multi_query_attention": self.multi_query,
            "multi_query_group_num": GROUPS,
            "kv_channels": HEAD_DIM,
            "num_layers": LAYERS,
            "seq_length": 64,
            "layernorm_epsilon": 1e-5,
            "eos_token_id": 2,
        }
        (directory / "config.json").write_text(json.dumps(config))
        save_file(self.tensors, directory / "model.safetensors")

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, T, vocabulary)."""
        x = self.tensors["transformer.embedding.word_embeddings.weight"][ids]
        for i in range(LAYERS):
            x = self.layer(x, f"transformer.encoder.layers.{i}.")
        return self.norm(x, "transformer.encoder.final_layernorm") @ self.tensors["transformer.output_layer.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.tensors[f"{name}.weight"]

    def layer(self, x: Tensor, prefix: str) -> Tensor:
        w = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        h = self.norm(x, f"{prefix}input_layernorm")
        qkv = h @ w["self_attention.query_key_value.weight"].T + w["self_attention.query_key_value.bias"]
        x = x + self.attention(qkv) @ w["self_attention.dense.weight"].T
        gate, up = (self.norm(x, f"{prefix}post_attention_layernorm") @ w["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        return x + (functional.silu(gate) * up) @ w["mlp.dense_4h_to_h.weight"].T

    def attention(self, qkv: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v over what came before, (B, T, HEADS * HEAD_DIM)."""
        heads = qkv.unflatten(-1, (-1, HEAD_DIM))
        q, k, v = heads.split([HEADS, self.kv_heads, self.kv_heads], dim=2)
        repeat = HEADS // self.kv_heads
        k, v = turned(k).repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        scores = torch.einsum("bthd,bshd->bhts", turned(q), k) / HEAD_DIM**0.5
        count = qkv.shape[1]
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)


def turned(heads: Tensor) -> Tensor:
    """(B, T, heads, d): the first d / 2 inputs as complex numbers, each times e^(i position theta_j)."""
    half = HEAD_DIM // 2
    theta = 10000.0 ** (-torch.arange(0, half, 2) / half)
    angles = torch.arange(heads.shape[1]).unsqueeze(1) * theta
    numbers = torch.view_as_complex(heads[..., :half].float().contiguous().unflatten(-1, (-1, 2)))
    rotated = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat([torch.view_as_real(rotated).flatten(-2), heads[..., half:]], -1)
