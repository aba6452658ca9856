"""The product of int8 rows with an int8 weight by Hopper's warpgroup instructions, W read once: csrc/w8a8_gemm.cu."""

import torch
from torch import Tensor

from lowbit.quant.kernels import ring
from lowbit.quant.kernels.extension import EXTENSION
from lowbit.quant.kernels.problem import Problem, check_alignment
from lowbit.quant.kernels.ring import Launch
from lowbit.quant.kernels.w8a8 import Int8Call

WARPGROUPS = (1, 2, 4)  # multiplying warpgroups per block
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or None."""
    return ring.reason_against_gpu(problem)


def choose_launch(problem: Problem) -> Launch:
    """The launch for `problem`. With up to 64 rows of x, half of the GPU is left to the next product, which is launched
    early and reads its own weight there: measured faster than using all of it."""
    room = problem.processors if problem.m > ring.COLUMNS[-1] // 2 else problem.processors // 2
    return ring.choose_launch(problem.m, problem.n, problem.k, problem.processors, room)


def run(call: Int8Call, problem: Problem, launch: Launch | None = None) -> Tensor:
    """y of `call`, which w8a8.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    assert EXTENSION is not None
    y = torch.empty(call.y_shape, dtype=call.dtype, device=call.x.device)
    cut = ring.launch_of(launch or choose_launch(problem), y.device.index, call.dependent)
    with torch.cuda.device(y.device):
        stream = torch.cuda.current_stream().cuda_stream
        EXTENSION.w8a8_gemm(args_of(call, y), cut, OUTPUTS.index(call.dtype), stream)
    return y


def args_of(call: Int8Call, y: Tensor) -> object:
    """csrc/w8a8_args.cuh's struct: addresses (0 for None) and sizes."""
    assert EXTENSION is not None
    weight = call.weight
    tensors = {"x": call.x, "codes": weight.codes, "bias": call.bias, "residual": call.residual, "y": y}
    check_alignment(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    args = EXTENSION.W8a8Args()
    for name, tensor in (tensors | {"x_scales": call.x_scales, "scales": weight.scales}).items():
        setattr(args, name, 0 if tensor is None else tensor.data_ptr())
    args.m, args.k = call.x.shape
    args.n = weight.n
    return args
