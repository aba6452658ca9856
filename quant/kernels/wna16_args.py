"""Arguments of the products with a packed weight: csrc/wna16_args.cuh's struct, filled from a PackedCall."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import panels, reference
from lowbit.quant.kernels.extension import launch
from lowbit.quant.kernels.packed import CHUNK_K, padded, scale_shift
from lowbit.quant.kernels.problem import PackedCall, Rotary, check_alignment, has_fast_memory

# Bytes of the next product's weight to prefetch. Of a step of Llama-2-7B in 4 bits, 2 MB save 2.6%, 3 MB 3.4%, 4 MB
# 3.9% (docs/kernels/wna16_gemv.md). In an earlier form, 8 MB lost what 3 MB gained.
NEXT_BYTES = 4 << 20
# With fast memory. On an H200, us a step with 28 warps for long k, 1 x 128 and 8 x 128: 7B 1343 with 4 MB and 1331,
# 1593 and 1579; 13B 2252 and 2244, 2749 and 2732; Llama-3-8B 1441 and 1432, 1636 and 1623.
FAST_NEXT_BYTES = 6 << 20
# Fields of the struct that are the call's own.
SAME = ["x", "bias", "residual", "norm", "norm_weight", "norm_bias", "activation", "float32_out", "next_weight"]


def prepare(call: PackedCall, most_staged: int) -> PackedCall:
    """`call` adapted to the kernels: k padded to whole chunks, norms applied that need more than `most_staged` bytes,
    alignment checked."""
    m, k = panels.shape_of(call.x)
    whole = padded(k, CHUNK_K)
    if call.deferred is not None and call.deferred.squares.nbytes > most_staged:
        call = replace(call, x=reference.divided(panels.rows_of(call.x), call.deferred), deferred=None)
    if call.norm != "none" and (whole != k or m * k * 2 > most_staged):
        call = replace(call, x=reference.normalize(call), norm="none", norm_weight=None, norm_bias=None)
    if whole != k:
        call = replace(call, x=torch.nn.functional.pad(call.x, (0, whole - k)))
    w = call.weight
    check_alignment(x=call.x, words=w.words, scales=w.scales, zeros=w.zeros, factors=w.factors)
    check_alignment(next_weight=call.next_weight)
    if call.deferred is not None:
        check_alignment(squares=call.deferred.squares)
    if call.next_norm is not None:
        check_alignment(next_norm=call.next_norm.weight)
    return call


def args_of(call: PackedCall, y: Tensor) -> dict[str, Any]:
    """The kernels' struct, by name."""
    weight, deferred, following, rotary = call.weight, call.deferred, call.next_norm, call.rotary
    (m, k), (tiles, chunks), ahead = panels.shape_of(call.x), weight.words.shape[:2], call.next_weight
    kv_heads = 0 if rotary is None else rotary.kv_heads
    rows = (call.bias, call.residual, y, *((rotary.k_cache, rotary.v_cache) if rotary else ()))
    return {
        **{name: getattr(call, name) for name in SAME},
        **{field.name: getattr(rotary, field.name, None) for field in fields(Rotary)},
        "words": weight.words,
        "scales": weight.scales if weight.scale_groups else None,
        "zeros": weight.zeros,
        "y": y,
        "m": m,
        "n": weight.n,
        "k": k,
        "tiles": tiles,
        "chunks": chunks,
        "x_panel": panels.height_of(call.x),
        "y_panel": panels.height_of(y) if call.y_panels else 0,
        "z_panel": 0 if following is None else panels.height_of(following.z),
        "stage_x": call.norm != "none",
        "pair_block": weight.pair_block,
        "scale_rows": weight.scales.shape[1],
        "scale_shift": scale_shift(weight.group_size),
        "norm_eps": call.norm_eps if deferred is None else deferred.eps,
        "vectors": weight.n % 8 == 0 and all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in rows),
        "q_heads": 0 if rotary is None else weight.n // rotary.head_dim - 2 * kv_heads,
        "kv_heads": kv_heads,
        "next_bytes": 0 if ahead is None else min(most_ahead(y.device), ahead.nbytes) // 16 * 16,
        "x_squares": None if deferred is None else deferred.squares,
        "x_parts": 0 if deferred is None else deferred.squares.shape[1],
        "next_norm": None if following is None else following.weight,
        "z": None if following is None else following.z,
        "squares": None if following is None else following.squares,
        "factors": weight.factors,
    }


def most_ahead(device: torch.device) -> int:
    """The most bytes of the next product's weight to prefetch."""
    return FAST_NEXT_BYTES if device.type == "cuda" and has_fast_memory(device) else NEXT_BYTES


def launch_product(kernel: str, call: PackedCall, y: Tensor, **cut: Any) -> None:
    """Run a kernel on `call`, which `prepare` has adapted. `cut` is its launch struct, without groups_per_chunk."""
    weight = call.weight
    args, groups = args_of(call, y), weight.scale_groups
    launch(kernel, call.x.dtype, weight.variant, device=y.device, args=args, groups_per_chunk=groups, **cut)
