"""The product of few rows with a dense weight in half precision, in torch's layout, W read once: csrc/dense_gemv.cu."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import dense, ring
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.extension import launch
from lowbit.quant.kernels.problem import Problem
from lowbit.quant.kernels.ring import RingCut

MAX_M = 64
WARPGROUPS = (1, 2)  # multiplying warpgroups per block
STEP_BYTES = 16  # granularity of the copy engine (TMA): lengths, addresses and pitches of rows are multiples
VECTOR_BYTES = 8  # of four halves that epilogues read at once
GATED_STEP = 8  # n is a multiple of this for a weight with gate rows followed by up rows


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or None."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it is for float16 and bfloat16, not {problem.dtype}"
    if problem.m > MAX_M:
        return f"{problem.m} rows: it takes at most {MAX_M}"
    if problem.k * 2 % STEP_BYTES:
        return f"{problem.k} inputs: it takes multiples of {STEP_BYTES // 2}"
    return ring.reason_against_gpu(problem)


def choose_cut(problem: Problem) -> RingCut:
    """The launch for `problem`. It uses the whole GPU: 6% faster in a model's block than half of it, with the rest left
    to the next kernel."""
    processors = problem.processors
    return ring.choose_cut(problem.m, problem.n, problem.k * 2, processors, processors, problem.fast_memory)


def reason_against_memory(call: DenseCall) -> str | None:
    """The reason why the copy engine cannot read these tensors, or None."""
    for name, tensor in (("x", call.x), ("weight", call.weight)):
        pitch = pitch_of(tensor)
        if tensor.stride(1) != 1 or pitch < tensor.shape[1] * 2 or pitch % STEP_BYTES or tensor.data_ptr() % STEP_BYTES:
            where = f"{tensor.data_ptr():#x} with strides {tensor.stride()}"
            return f"{name} at {where}: the copy engine reads rows that start at multiples of {STEP_BYTES} bytes"
    for name, side in (("bias", call.bias), ("residual", call.residual)):
        if side is not None and not side.is_contiguous():
            return f"{name} has strides {side.stride()}: it must be contiguous"
    if call.deferred is not None and call.deferred.squares.data_ptr() % STEP_BYTES:
        return f"sums of squares at {call.deferred.squares.data_ptr():#x}: they are read {STEP_BYTES} bytes at a time"
    if call.activation == "silu_mul" and call.weight.shape[0] % GATED_STEP:
        return f"{call.weight.shape[0]} rows of gate and up: it takes multiples of {GATED_STEP}"
    if call.rotary is not None and call.rotary.head_dim % ring.ROWS:
        return f"heads of {call.rotary.head_dim}: it turns those of multiples of {ring.ROWS}"
    if call.next_norm is not None and not in_vectors(call.bias, call.residual, call.next_norm.weight):
        return f"bias, residual or the next norm's weight start at no multiple of {VECTOR_BYTES} bytes"
    return None


def in_vectors(*tensors: Tensor | None) -> bool:
    """True if four halves of each tensor can be read at once."""
    return all(tensor is None or tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)


def run(call: DenseCall, problem: Problem, cut: RingCut | None = None) -> Tensor:
    """y of `call`, which dense.check has passed; by torch if the copy engine cannot read its tensors."""
    if reason_against_memory(call):
        return dense.reference(call)
    y = call.empty()
    cut = cut or choose_cut(problem)
    if call.rotary is not None and call.rotary.head_dim % (cut.warpgroups * ring.ROWS):
        cut = replace(cut, warpgroups=1)
    launch("dense_gemv", call.x.dtype, device=y.device, args=args_of(call, y), dependent=call.dependent, **vars(cut))
    return y


def args_of(call: DenseCall, y: Tensor) -> dict[str, Any]:
    """csrc/dense_gemv.cu's struct."""
    (m, k), n, deferred = call.x.shape, call.weight.shape[0], call.deferred
    rotary, following = call.rotary, call.next_norm
    caches = (None, None) if rotary is None else (rotary.k_cache, rotary.v_cache)
    aligned = in_vectors(call.bias, call.residual, y, *caches)
    return {
        **ring.heads_of(rotary, n),
        "next_norm": None if following is None else following.weight,
        "z": None if following is None else following.z,
        "squares": None if following is None else following.squares,
        "x": call.x,
        "w": call.weight,
        "bias": call.bias,
        "residual": call.residual,
        "x_squares": None if deferred is None else deferred.squares,
        "norm_eps": 0.0 if deferred is None else deferred.eps,
        "y": y,
        "m": m,
        "n": n,
        "k": k,
        "x_pitch": pitch_of(call.x),
        "w_pitch": pitch_of(call.weight),
        "activation": call.activation,
        "float32_out": call.float32_out,
        "vectors": aligned and n % 4 == 0,
    }


def pitch_of(tensor: Tensor) -> int:
    """Bytes from one row to the next. For a single row this is its length, whatever its stride."""
    return (tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]) * tensor.element_size()
