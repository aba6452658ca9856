"""Attention of a prompt's chunk over its sequence so far, by torch's fused attention."""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional

from lowbit.engine.architecture import Architecture, Layer

FLASH_DIM = 256  # widest heads of the flash kernel; others' fused kernels share no heads of k and v
ROWS = 512  # of q at a time, where all scores are written out
# Lengths of whole prompts for which cuDNN's kernel is worth its plan, which takes 35 ms at the first prompt of a
# length: those of captured passes, and multiples of STEP. Others take the flash kernel, which needs none.
PLANNED, STEP = 1024, 256


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    architecture: Architecture,
    layer: Layer,
    sinks: Tensor | None = None,
    prompts: int = 1,
) -> Tensor:
    """softmax(scale q k^T) v for the last T of L positions of each prompt, causal.

    q        (prompts * T, heads * head_dim)
    k, v     (prompts * L, kv_heads, head_dim), L >= T
    sinks    (heads) scores of one more position, without a value
    prompts  sequences, one after another
    return   (prompts * T, heads * head_dim)
    """
    count, length = q.shape[0] // prompts, k.shape[0] // prompts
    heads = q.view(prompts, count, -1, k.shape[2]).transpose(1, 2)
    keys, values = (part.unflatten(0, (prompts, length)).transpose(1, 2) for part in (k, v))
    if architecture.softcap is not None or sinks is not None:
        return plain_attention(heads, keys, values, architecture, layer, sinks)
    windowed = layer.window is not None and layer.window < length
    if windowed or k.shape[2] > FLASH_DIM:
        keys, values = (part.repeat_interleave(heads.shape[1] // k.shape[1], 1) for part in (keys, values))
    if not windowed:
        out = causal_attention(heads, keys, values, layer.scale)
    else:
        seen = visible(count, length, layer.window, q.device)
        out = functional.scaled_dot_product_attention(heads, keys, values, attn_mask=seen, scale=layer.scale)
    return out.transpose(1, 2).reshape(len(q), -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention without a window: q (prompts, heads, T, head_dim); k, v (prompts, kv_heads, L, head_dim)."""
    count, length, shared = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    flash = q.is_cuda and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True))
    if count == length and (length <= PLANNED or length % STEP == 0 or not flash):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    if flash:
        # The flash kernel aligns a causal mask with the last key, and needs no mask tensor. torch.nn.attention.bias
        # does the same, but takes seconds to import.
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal=True, scale=scale)[0]
    seen = visible(count, length, None, q.device)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=shared)


def visible(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, L) bool: True if one of the last T positions attends to one of L positions."""
    behind = torch.arange(length - count, length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (behind >= 0) & (behind < window) if window is not None else behind >= 0


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, architecture: Architecture, layer: Layer, sinks: Tensor | None
) -> Tensor:
    """Causal attention with a softcap on scores or with sinks, which torch's fused attention lacks; (prompts * T, heads
    * head_dim). It goes by ROWS of q, so that scores do not grow with the square of the prompt."""
    count, length = q.shape[2], k.shape[2]
    grouped, seen = q.unflatten(1, (k.shape[1], -1)), visible(count, length, layer.window, q.device)
    parts = [
        plain_rows(part, k, v, (architecture.softcap, layer.scale), mask, sinks)
        for part, mask in zip(grouped.split(ROWS, 3), seen.split(ROWS), strict=True)
    ]
    return torch.cat(parts, 3).flatten(1, 2).transpose(1, 2).reshape(len(q) * count, -1)


def plain_rows(
    q: Tensor, k: Tensor, v: Tensor, factors: tuple[float | None, float], seen: Tensor, sinks: Tensor | None
) -> Tensor:
    """Attention (prompts, kv_heads, group, rows, head_dim) of some rows.

    factors  softcap and scale
    seen     (rows, length) bool
    """
    softcap, scale = factors
    scores = torch.einsum("bhgtd,bhld->bhgtl", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf")).float()
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.float().view(1, q.shape[1], q.shape[2], 1, 1).expand(*scores.shape[:4], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhgtl,bhld->bhgtd", weights.to(q.dtype), v)
