"""Scales of an FP8 key-value cache in a checkpoint: `key ~ code * scale`, keys after the rotary embedding.

For an attention module A, in files of compressed-tensors:

    A.k_scale, A.v_scale  float32  (1,), or (kv_heads, 1, 1) with one scale per head
    A.q_scale             float32  (1,), or (heads, 1, 1): of queries, for kernels that multiply in FP8

ModelOpt's files have A.k_proj.k_scale and A.v_proj.v_scale, () each, and no scale of queries.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

PER_TENSOR, PER_HEAD = "fp8", "fp8-head"
CACHES = (PER_TENSOR, PER_HEAD)
NAME = re.compile(r"(?P<attention>.+?)(\.[qkv]_proj)?\.(?P<part>[qkv])_scale")


def cache_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The file's names of cache scales among `names`: attention -> part ("q", "k" or "v") -> name."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = NAME.fullmatch(name)
        if match:
            found.setdefault(match["attention"], {})[match["part"]] = name
    return found


def usable(name: str, scale: Tensor) -> Tensor:
    """The cache scale `name` as float32: (1,), or (heads, 1, 1). CheckpointError if it is no scale."""
    value = scale.float().reshape(-1)
    if not value.numel() or not bool((torch.isfinite(value) & (value > 0)).all()):
        raise CheckpointError(f"{name}: {value[:8].tolist()} scale no cache; finite, positive numbers do")
    return value if value.numel() == 1 else value.view(-1, 1, 1)
