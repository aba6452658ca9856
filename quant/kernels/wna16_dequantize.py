"""Dequantization of a packed weight to a dense half-precision matrix, and the product with many rows of x that uses
it."""

import torch
from torch import Tensor

from lowbit.quant.kernels import reference, row_norm
from lowbit.quant.kernels.decode_attention import append, appended
from lowbit.quant.kernels.extension import EXTENSION, launch, reason_against_device
from lowbit.quant.kernels.packed import PackedWeight, dequantize_packed, scale_shift
from lowbit.quant.kernels.problem import PackedCall, Problem, check_alignment
from lowbit.quant.kernels.row_norm import Rows


def reason_against(problem: Problem) -> str | None:
    """The reason why the product with a dequantized weight cannot run the problem, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    return reason_against_device(problem.capability)


def run(call: PackedCall, problem: Problem | None = None) -> Tensor:
    """y of `call`: the weight is dequantized to x's dtype once, then the vendor's matrix product reads it.

    An epilogue that the product itself, or one kernel after it, can apply does not go through float32 in memory: that
    would cost 12 bytes per element of y, a third of the product's time for 4096 inputs, and for rotary embedding seven
    times as many.
    """
    w = dequantize(call.weight)
    active = call.activation != "none"
    if call.float32_out or (call.residual is not None and (active or call.bias is not None)):
        return reference.compute(call, w)
    x, addend = reference.normalize(call), call.bias if call.residual is None else call.residual
    sums = x @ w.T if addend is None else torch.addmm(addend, x, w.T)
    if call.rotary is not None:
        return append(appended(sums, call.rotary))
    return row_norm.run(Rows(sums, activation=call.activation)) if active else sums


def empty(weight: PackedWeight) -> Tensor:
    """Memory for the dense weight (n, k)."""
    return weight.words.new_empty(weight.n, weight.k, dtype=weight.dtype)


def dequantize(weight: PackedWeight) -> Tensor:
    """(code - zero) * scale, rounded once to the scales' dtype, (n, k), on the weight's device.

    ValueError if the packed tensors are not aligned to 16 bytes.
    """
    if EXTENSION is None or weight.words.device.type != "cuda":
        return dequantize_packed(weight).to(weight.dtype)
    check_alignment(words=weight.words, scales=weight.scales)
    w = empty(weight)
    args = {
        "words": weight.words,
        "scales": weight.scales if weight.scale_groups else None,
        "zeros": weight.zeros,
        "w": w,
        "n": weight.n,
        "k": weight.k,
        "pair_block": weight.pair_block,
        "groups_per_chunk": weight.scale_groups,
        "scale_rows": weight.scales.shape[1],
        "scale_shift": scale_shift(weight.group_size),
        "factors": weight.factors,
    }
    launch("wna16_dequantize", weight.dtype, weight.variant, device=w.device, args=args)
    return w
