"""GPTQ's inner loop: a block of columns is rounded one by one, with each error compensated in the columns behind it.

On a GPU one warp keeps a row of the block in registers through all columns (csrc/gptq_block.cu), so that a block takes
one launch instead of some hundred. Elsewhere plain torch runs, which is also the reference.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.quant.kernels.extension import EXTENSION, launch, reason_against_device
from lowbit.quant.numbers import round_to_grid

MOST_COLUMNS = 128
MOST_WEIGHTS = 65535  # blocks of a launch in its second dimension


@dataclass(frozen=True)
class BlockCall:
    """A block of columns to round in order, each column's error pushed onto the later ones.

    w                (e, n, b)  float32, of e weights of one shape; b at most 128
    factor           (e, b, b)  float32, upper triangular: GPTQ's factor of each inverse second moment
    scales, zeros    (e, n, b)  float32, those of each column's group
    low, high        smallest and largest code
    fineness, least  step of the grid, as in numbers.round_to_grid
    """

    w: Tensor
    factor: Tensor
    scales: Tensor
    zeros: Tensor
    low: float
    high: float
    fineness: float
    least: float

    def empty(self) -> tuple[Tensor, Tensor]:
        """Memory for codes and errors."""
        return torch.empty_like(self.w), torch.empty_like(self.w)


def run(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Codes (e, n, b) float32, and errors (e, n, b) float32: (w_j - rounded_j) / factor_jj at the time of rounding.

    ValueError for other dtypes or shapes.
    """
    w = call.w
    if w.ndim != 3 or w.shape[-1] > MOST_COLUMNS or len(w) > MOST_WEIGHTS:
        limits = f"{MOST_WEIGHTS}, n, {MOST_COLUMNS}"
        raise ValueError(f"a block of columns is {list(w.shape)}; at most [{limits}] fit")
    e, n, b = w.shape
    wanted = {"w": (e, n, b), "factor": (e, b, b), "scales": (e, n, b), "zeros": (e, n, b)}
    for name, shape in wanted.items():
        tensor = getattr(call, name)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != w.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; float32 {list(shape)} "
                f"on {w.device} fits"
            )
    if EXTENSION is None or not w.is_cuda or reason_against_device(torch.cuda.get_device_capability(w.device)):
        return reference(call)
    call = replace(call, **{name: getattr(call, name).contiguous() for name in wanted})
    codes, errors = call.empty()
    outputs = {"codes": codes, "errors": errors, "weights": e, "n": n, "columns": b}
    launch("gptq_block", device=w.device, args=vars(call) | outputs)
    return codes, errors


def reference(call: BlockCall) -> tuple[Tensor, Tensor]:
    """The reference: one column at a time."""
    w, (codes, errors), (scales, zeros) = call.w.clone(), call.empty(), (call.scales, call.zeros)
    for j in range(w.shape[-1]):
        nearest = round_to_grid(w[..., j] / scales[..., j], call.fineness, call.least)
        codes[..., j] = (nearest + zeros[..., j]).clamp(call.low, call.high)
        rounded = (codes[..., j] - zeros[..., j]) * scales[..., j]
        errors[..., j] = (w[..., j] - rounded) / call.factor[:, j, j, None]
        w[..., j + 1 :].addcmul_(errors[..., j, None], call.factor[:, j, None, j + 1 :], value=-1)
    return codes, errors
