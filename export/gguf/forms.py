"""The form of each tensor in GGUF: what llama.cpp expects of it, and the way back to transformers' tensor.

Vectors and routers are float32. Rows of q and k of the Llama family are in another order, in whole rows, so that it
moves the blocks of a quantized weight and no code. Norms of Gemma have 1 added.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.blocks import BY_NUMBER
from lowbit.export.gguf.families import UNUSED, Family, Place, place_of
from lowbit.export.gguf.hyper import heads_of

F32, F16, BF16 = 0, 1, 30  # numbers of block types of one number
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
MATRICES = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # those that Conv1D has transposed
ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")


def held(name: str, tensor: Tensor, config: Mapping[str, Any], family: Family) -> Tensor | None:
    """The unquantized tensor `name` as a file gives it back; None if GGUF has no place for it and nobody needs it."""
    if UNUSED.search(name):
        return None
    place = place_of(family, name)
    wide = tensor.ndim == 1 or (place is not None and place.part in ROUTERS) or tensor.dtype not in KINDS
    tensor = tensor.float() if wide else tensor
    return tensor if place is None else logical(stored(tensor, place, config, family), place, config, family)


def stored(tensor: Tensor, place: Place, config: Mapping[str, Any], family: Family) -> Tensor:
    """transformers' tensor, or the bytes of a weight's rows, as GGUF has it."""
    if _is_turned(place, family):
        heads, half = _halves(tensor, place, config)
        return tensor.unflatten(0, (heads, 2, half)).transpose(1, 2).flatten(0, 2).contiguous()
    if _is_raised(place, family):
        return tensor.float() + family.raised
    if _is_transposed(tensor, place, family):
        return tensor.T.contiguous()
    return tensor.reshape(-1) if place.part == ROUTERS[1] else tensor


def logical(tensor: Tensor, place: Place, config: Mapping[str, Any], family: Family) -> Tensor:
    """transformers' tensor from the one in GGUF: the inverse of `stored`."""
    if _is_turned(place, family):
        heads, half = _halves(tensor, place, config)
        return tensor.unflatten(0, (heads, half, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    if _is_raised(place, family):
        return tensor - family.raised
    if _is_transposed(tensor, place, family):
        return tensor.T.contiguous()
    return tensor.reshape(1, -1) if place.part == ROUTERS[1] else tensor


def _halves(tensor: Tensor, place: Place, config: Mapping[str, Any]) -> tuple[int, int]:
    """The heads among the rows of q or k, and half the rows of each. CheckpointError if these are not all rows."""
    heads, rows = heads_of(config, place.part), tensor.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(
            f"{place.name}: {rows} rows are no {heads} heads of an even width, which config.json says"
        )
    return heads, rows // (2 * heads)


def _is_turned(place: Place, family: Family) -> bool:
    return family.turned and place.part in ("attn_q", "attn_k") and not place.name.endswith(".scale")


def _is_raised(place: Place, family: Family) -> bool:
    return family.raised != 0 and place.part.endswith("norm")


def _is_transposed(tensor: Tensor, place: Place, family: Family) -> bool:
    """True for a plain matrix of Conv1D; the rows of quantized ones are outputs."""
    return family.transposed and place.part in MATRICES and tensor.ndim == 2 and tensor.dtype != torch.uint8


def type_of(kind: int) -> str:
    """The suffix of a linear's name for a tensor of this block type; empty for a type of one number."""
    return BY_NUMBER[kind].name.lower() if kind in BY_NUMBER else ""
