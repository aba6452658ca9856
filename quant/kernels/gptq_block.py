"""GPTQ's inner loop: a block of columns is rounded one by one, with each error compensated in the columns behind it.

On a GPU one warp keeps a row of the block in registers through all columns (csrc/gptq_block.cu), so that a block takes
one launch instead of some hundred. Elsewhere plain torch runs, which is also the reference.
"""

import torch
from torch import Tensor

from lowbit.quant.kernels.extension import EXTENSION, reason_against_device
from lowbit.quant.numbers import round_to_grid

MOST_COLUMNS = 128

Grid = tuple[float, float, float, float]  # low, high, fineness, least


def gptq_block(
    w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, low: float, high: float, fineness: float, least: float
) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors (n, b) of the columns of `w`, rounded in order.

    w                (n, b)  float32, b at most 128
    factor           (b, b)  float32, upper triangular: GPTQ's factor of the inverse second moment
    scales, zeros    (n, b)  float32, those of each column's group
    low, high        smallest and largest code
    fineness, least  step of the grid, as in numbers.round_to_grid
    return           codes (n, b) float32; errors (n, b) float32: (w_j - rounded_j) / factor_jj at the time of rounding

    ValueError for other dtypes or shapes.
    """
    n, b = w.shape
    if b > MOST_COLUMNS:
        raise ValueError(f"a block of {b} columns; at most {MOST_COLUMNS} fit")
    wanted = (("w", w, (n, b)), ("factor", factor, (b, b)), ("scales", scales, (n, b)), ("zeros", zeros, (n, b)))
    for name, tensor, shape in wanted:
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != w.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; float32 {list(shape)} "
                f"on {w.device} fits"
            )
    if EXTENSION is None or not w.is_cuda or reason_against_device(torch.cuda.get_device_capability(w.device)):
        return _loop(w, factor, scales, zeros, (low, high, fineness, least))
    grid = low, high, fineness, least
    return _launch(w.contiguous(), factor.contiguous(), scales.contiguous(), zeros.contiguous(), grid)


def _launch(w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    assert EXTENSION is not None
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    args = EXTENSION.GptqBlockArgs()
    args.w, args.factor, args.scales, args.zeros = (t.data_ptr() for t in (w, factor, scales, zeros))
    args.codes, args.errors = codes.data_ptr(), errors.data_ptr()
    args.n, args.columns = w.shape
    args.low, args.high, args.fineness, args.least = grid
    with torch.cuda.device(w.device):
        EXTENSION.gptq_block(args, w.device.index, torch.cuda.current_stream().cuda_stream)
    return codes, errors


def _loop(w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The reference: one column at a time."""
    low, high, fineness, least = grid
    w = w.clone()
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for j in range(w.shape[1]):
        nearest = round_to_grid(w[:, j] / scales[:, j], fineness, least)
        codes[:, j] = (nearest + zeros[:, j]).clamp(low, high)
        rounded = (codes[:, j] - zeros[:, j]) * scales[:, j]
        errors[:, j] = (w[:, j] - rounded) / factor[j, j]
        w[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    return codes, errors
