"""Arguments of the products with a packed weight: csrc/wna16_args.cuh's struct, filled from a Call."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import reference
from lowbit.quant.kernels.extension import EXTENSION
from lowbit.quant.kernels.packed import CHUNK_K, padded, scale_shift
from lowbit.quant.kernels.problem import ACTIVATIONS, NORMS, Call, check_alignment

# Bytes of the next product's weight to prefetch. Of a step of Llama-2-7B in 4 bits, 2 MB save 2.6%, 3 MB 3.4%, 4 MB
# 3.9% (docs/kernels/wna16_gemv.md). In an earlier form, 8 MB lost what 3 MB gained.
NEXT_BYTES = 4 << 20


def prepare(call: Call, most_staged: int) -> Call:
    """`call` adapted to the kernels: k padded to whole chunks, norms applied that need more than `most_staged` bytes,
    alignment checked."""
    m, k = call.x.shape
    whole = padded(k, CHUNK_K)
    if call.deferred is not None and call.deferred.squares.nbytes > most_staged:
        call = replace(call, x=reference.divided(call.x, call.deferred), deferred=None)
    if call.norm != "none" and (whole != k or m * k * 2 > most_staged):
        call = replace(call, x=reference.normalize(call), norm="none", norm_weight=None, norm_bias=None)
    if whole != k:
        call = replace(call, x=torch.nn.functional.pad(call.x, (0, whole - k)))
    w = call.weight
    check_alignment(x=call.x, words=w.words, scales=w.scales, zeros=w.zeros, next_weight=call.next_weight)
    if call.deferred is not None:
        check_alignment(squares=call.deferred.squares)
    if call.next_norm is not None:
        check_alignment(next_norm=call.next_norm.weight)
    return call


def args_of(call: Call, y: Tensor) -> Any:
    """The kernels' struct: addresses (0 for None) and sizes."""
    assert EXTENSION is not None
    weight = call.weight
    args = EXTENSION.Wna16Args()
    tensors = {
        "x": call.x,
        "words": weight.words,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "bias": call.bias,
        "residual": call.residual,
        "norm_weight": call.norm_weight,
        "norm_bias": call.norm_bias,
        "y": y,
        "next_weight": call.next_weight,
    }
    args.next_bytes = 0 if call.next_weight is None else min(NEXT_BYTES, call.next_weight.nbytes) // 16 * 16
    args.m, args.k = call.x.shape
    args.n, args.pair_block = weight.n, weight.pair_block
    args.tiles, args.chunks = weight.words.shape[:2]
    args.stage_x = call.norm != "none"
    args.scale_rows, args.scale_shift = weight.scales.shape[1], scale_shift(weight.group_size)
    args.norm, args.norm_eps = NORMS.index(call.norm), call.norm_eps
    args.activation, args.float32_out = ACTIVATIONS.index(call.activation), call.float32_out
    if call.rotary is not None:
        tensors |= vars(call.rotary)
        args.kv_heads = call.rotary.kv_heads
        args.q_heads = weight.n // call.rotary.head_dim - 2 * args.kv_heads
    if call.deferred is not None:
        tensors["x_squares"], args.norm_eps = call.deferred.squares, call.deferred.eps
        args.x_parts = call.deferred.squares.shape[1]
    if call.next_norm is not None:
        tensors |= {"next_norm": call.next_norm.weight, "z": call.next_norm.z, "squares": call.next_norm.squares}
    for name, tensor in tensors.items():
        setattr(args, name, 0 if tensor is None else tensor.data_ptr())
    rows = (call.bias, call.residual, y, *((call.rotary.k_cache, call.rotary.v_cache) if call.rotary else ()))
    args.vectors = weight.n % 8 == 0 and all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in rows)
    return args
