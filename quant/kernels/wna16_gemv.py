"""The product of a few rows (m <= 64) with a 4- or 8-bit weight, prologue and epilogue fused: csrc/wna16_gemv.cu."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.kernels.extension import EXTENSION, reason_against_device
from quant.kernels.packed import CHUNK_K, TILE_ROWS, groups_per_chunk, padded, scale_shift
from quant.kernels.problem import ACTIVATIONS, NORMS, Call, Problem

MAX_M = 64


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    row_tiles  tiles of 16 rows that a warp multiplies with one read of x
    row_warps  warps of a block side by side over n, a power of two
    k_warps    warps of a block that share k
    cluster    blocks that share k and sum through each other's shared memory
    """

    row_tiles: int
    row_warps: int
    k_warps: int
    cluster: int


def reason_against(problem: Problem) -> str | None:
    """Why this kernel cannot take the problem, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    if problem.m > MAX_M:
        return f"{problem.m} rows: it takes at most {MAX_M}"
    return reason_against_device(problem.capability)


def choose_launch(problem: Problem) -> Launch:
    """One rule for all shapes."""
    chunks = padded(problem.k, CHUNK_K) // CHUNK_K
    row_tiles, row_warps = 1 if problem.m <= 8 else 2, 1
    groups = -(-problem.n // (TILE_ROWS * row_tiles * row_warps))
    k_warps = 2
    while k_warps * row_warps < 8 and k_warps < chunks and groups * k_warps < 9 * problem.processors:
        k_warps *= 2
    return Launch(row_tiles, row_warps, k_warps, 1)


def run(call: Call, problem: Problem, launch: Launch | None = None) -> Tensor:
    """y of `call`. The caller has checked it (problem.check)."""
    assert EXTENSION is not None
    if call.x.shape[1] % CHUNK_K:
        call = pad_inputs(call)
    y = torch.empty(call.y_shape, dtype=call.y_dtype, device=call.x.device)
    args = args_of(call, y)
    with torch.cuda.device(y.device):
        stream = torch.cuda.current_stream().cuda_stream
        cut = launch_of(launch or choose_launch(problem), call, y.device.index)
        EXTENSION.wna16_gemv(call.x.dtype == torch.bfloat16, call.weight.bits, args, cut, stream)
    return y


def pad_inputs(call: Call) -> Call:
    """`call` with x and the norm's vectors padded with zeros to whole chunks of k."""
    padding = (0, padded(call.x.shape[1], CHUNK_K) - call.x.shape[1])
    return replace(call, x=torch.nn.functional.pad(call.x, padding))


def args_of(call: Call, y: Tensor):
    """The kernel's arguments: addresses (0 for what is absent) and sizes."""
    assert EXTENSION is not None
    weight = call.weight
    args = EXTENSION.Wna16GemvArgs()
    tensors = {"x": call.x, "words": weight.words, "scales": weight.scales, "zeros": weight.zeros, "bias": call.bias,
               "residual": call.residual, "norm_weight": call.norm_weight, "norm_bias": call.norm_bias, "y": y}
    args.m, args.k = call.x.shape
    args.n, args.pair_block = weight.n, weight.pair_block
    args.tiles, args.chunks = weight.words.shape[:2]
    args.stage_x = call.norm != "none"
    args.scale_rows, args.scale_shift = weight.scales.shape[1], scale_shift(weight.group_size)
    args.norm, args.norm_eps, args.activation = NORMS.index(call.norm), call.norm_eps, ACTIVATIONS.index(call.activation)
    args.float32_out = call.float32_out
    if call.rotary is not None:
        tensors |= vars(call.rotary)
        args.kv_heads = call.rotary.kv_heads
        args.q_heads = weight.n // call.rotary.head_dim - 2 * args.kv_heads
    for name, tensor in tensors.items():
        setattr(args, name, 0 if tensor is None else tensor.data_ptr())
    return args


def launch_of(launch: Launch, call: Call, device: int):
    assert EXTENSION is not None
    cut = EXTENSION.Wna16GemvLaunch()
    for name, value in vars(launch).items():
        setattr(cut, name, value)
    cut.device, cut.groups_per_chunk, cut.dependent = device, groups_per_chunk(call.weight.group_size), call.dependent
    return cut
