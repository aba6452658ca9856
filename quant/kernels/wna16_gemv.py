"""The product of a few rows (m <= 64) with a 4- or 8-bit weight, prologue and epilogue fused: csrc/wna16_gemv.cu."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant.kernels import reference
from quant.kernels.extension import EXTENSION, reason_against_device
from quant.kernels.packed import CHUNK_K, TILE_ROWS, groups_per_chunk, padded, scale_shift
from quant.kernels.problem import ACTIVATIONS, NORMS, Call, Problem, check_alignment

MAX_M = 64
MAX_WARPS = 8  # in a block
LONG_K = 64  # chunks
MOST_IDLE = 1.05  # of the chunks: where the last round of the warps would exceed it, one warp less may fit better


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
    """One rule for all shapes: one wave of blocks, and in it as many warps over k as the fullest multiprocessor holds.

    128 registers a thread leave room for 16 warps on a multiprocessor, 255 (more than 16 rows of x) for 8. Two tiles a
    warp halve the reads of x and its fixed costs; one tile is better where tiles are few. Two blocks share k where k is
    long and there would be fewer blocks than multiprocessors.
    """
    tiles, chunks = -(-problem.n // TILE_ROWS), -(-problem.k // CHUNK_K)
    room = 16 if problem.m <= 16 else 8
    row_tiles = choose_row_tiles(problem, tiles, chunks)
    groups = -(-tiles // row_tiles)
    clusters_exist = problem.capability is not None and problem.capability >= (9, 0)
    cluster = 2 if clusters_exist and problem.m > 8 and chunks >= LONG_K and groups <= problem.processors else 1
    blocks = -(-groups * cluster // max(problem.processors, 1))  # on the fullest multiprocessor
    k_warps = max(1, min(MAX_WARPS, room // blocks, chunks // cluster))
    rounds, with_one_less = (padded(chunks, cluster * warps) for warps in (k_warps, max(1, k_warps - 1)))
    if rounds > MOST_IDLE * chunks and with_one_less < rounds:
        k_warps -= 1
    return Launch(row_tiles, {1: 4, 2: 2}.get(k_warps, 1), k_warps, cluster)


def choose_row_tiles(problem: Problem, tiles: int, chunks: int) -> int:
    """1 or 2 tiles of 16 rows for a warp. Two of 8 bits, or in groups of 32, leave the ring too few registers."""
    if problem.m <= 8:
        crowded = problem.bits == 8 or problem.group_size == 32
        return 1 if crowded or tiles <= 4 * problem.processors else 2
    one_wave = tiles * MAX_WARPS <= 16 * problem.processors
    return 1 if problem.m <= 16 and one_wave and chunks < LONG_K else 2


def most_staged_bytes(capability: tuple[int, int] | None) -> int:
    """Shared memory for x where a norm comes before the product: what a block has left beside 73 KB of partial sums."""
    if capability is None or capability < (9, 0):
        return (64 if capability == (8, 0) else 24) << 10
    return 96 << 10


def run(call: Call, problem: Problem, launch: Launch | None = None) -> Tensor:
    """y of `call`, which problem.check has passed. ValueError where a tensor is not aligned to 16 bytes."""
    assert EXTENSION is not None
    launch = launch or choose_launch(problem)
    call = prepare(call, most_staged_bytes(problem.capability) * launch.cluster)
    y = torch.empty(call.y_shape, dtype=call.y_dtype, device=call.x.device)
    args = args_of(call, y)
    with torch.cuda.device(y.device):
        stream = torch.cuda.current_stream().cuda_stream
        cut = launch_of(launch, call, y.device.index)
        EXTENSION.wna16_gemv(call.x.dtype == torch.bfloat16, call.weight.bits, args, cut, stream)
    return y


def prepare(call: Call, most_staged: int) -> Call:
    """`call` as the kernel takes it: whole chunks of k, at most `most_staged` bytes of x to normalize, aligned."""
    m, k = call.x.shape
    whole = padded(k, CHUNK_K)
    if call.norm != "none" and (whole != k or m * k * 2 > most_staged):
        call = replace(call, x=reference.normalize(call), norm="none", norm_weight=None, norm_bias=None)
    if whole != k:
        call = replace(call, x=torch.nn.functional.pad(call.x, (0, whole - k)))
    check_alignment(x=call.x, words=call.weight.words, scales=call.weight.scales)
    return call


def args_of(call: Call, y: Tensor) -> Any:
    """The kernel's arguments: addresses (0 for what is absent) and sizes."""
    assert EXTENSION is not None
    weight = call.weight
    args = EXTENSION.Wna16GemvArgs()
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
    }
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
    for name, tensor in tensors.items():
        setattr(args, name, 0 if tensor is None else tensor.data_ptr())
    return args


def launch_of(launch: Launch, call: Call, device: int) -> Any:
    """The kernel's launch: the cut, the device, and what the call says of groups and dependence."""
    assert EXTENSION is not None
    cut = EXTENSION.Wna16GemvLaunch()
    for name, value in vars(launch).items():
        setattr(cut, name, value)
    cut.device, cut.groups_per_chunk, cut.dependent = device, groups_per_chunk(call.weight.group_size), call.dependent
    return cut
