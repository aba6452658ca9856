"""Attention of a prompt's chunk over its sequence so far, by torch's fused attention."""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional

from lowbit.engine.architecture import Architecture, Layer


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, architecture: Architecture, layer: Layer) -> Tensor:
    """softmax(scale q k^T) v for the last T of L positions, causal.

    q       (T, heads * head_dim)
    k, v    (L, kv_heads, head_dim), L >= T
    return  (T, heads * head_dim)
    """
    a = architecture
    count, length = q.shape[0], k.shape[0]
    heads = q.view(1, count, a.heads, a.head_dim).transpose(1, 2)
    keys, values = (part.unsqueeze(0).transpose(1, 2) for part in (k, v))
    if a.softcap is not None:
        return capped_attention(heads, keys, values, architecture, layer)
    if layer.window is None or layer.window >= length:
        out = causal_attention(heads, keys, values, layer.scale)
    else:
        groups = a.heads // a.kv_heads
        keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
        seen = visible(count, length, layer.window, q.device)
        out = functional.scaled_dot_product_attention(heads, keys, values, attn_mask=seen, scale=layer.scale)
    return out.transpose(1, 2).reshape(count, -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention without a window: q (1, heads, T, head_dim); k, v (1, kv_heads, L, head_dim)."""
    count, length = q.shape[2], k.shape[2]
    if count == length:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if q.is_cuda and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True)):
        # The flash kernel aligns a causal mask with the last key, and needs no mask tensor. torch.nn.attention.bias
        # does the same, but takes seconds to import.
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal=True, scale=scale)[0]
    seen = visible(count, length, None, q.device)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)


def visible(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, L) bool: True if one of the last T positions attends to one of L positions."""
    behind = torch.arange(length - count, length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (behind >= 0) & (behind < window) if window is not None else behind >= 0


def capped_attention(q: Tensor, k: Tensor, v: Tensor, architecture: Architecture, layer: Layer) -> Tensor:
    """Causal attention with a softcap on scores, which torch's fused attention lacks; (T, heads * head_dim)."""
    a = architecture
    assert a.softcap is not None
    count, length = q.shape[2], k.shape[2]
    grouped = q.unflatten(1, (a.kv_heads, -1))
    scores = torch.einsum("bhgtd,bhld->bhgtl", grouped, k) * layer.scale
    scores = a.softcap * torch.tanh(scores / a.softcap)
    scores = scores.masked_fill(~visible(count, length, layer.window, q.device), float("-inf"))
    weights = scores.float().softmax(-1).to(q.dtype)
    out = torch.einsum("bhgtl,bhld->bhgtd", weights, v)
    return out.flatten(1, 2).transpose(1, 2).reshape(count, -1)
