"""The product with int8 weights and int8 activations, by torch's own integer matrix product, as one operator.

lowbit has no kernel of its own for it yet: this is what both integrations run for W8A8 checkpoints.
"""

import torch
from torch import Tensor

MIN_ROWS = 17  # fewer rows cuBLAS does not multiply in int8
STEP = 8  # what it wants n and k to be multiples of


def reason_against(n: int, k: int) -> str | None:
    """Why no int8 weight (n, k) can be multiplied, or None."""
    return f"{n} x {k}: int8 products take multiples of {STEP}" if n % STEP or k % STEP else None


def quantize_rows(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (m, k) int8 of `x`, and scales (m, 1) float32: one calibrated for all rows, or each row's absmax / 127."""
    values = x.float()
    if input_scale is not None:
        scales = input_scale.float().reshape(1, 1).expand(x.shape[0], 1)
    else:
        scales = values.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (values / scales).round().clamp(-128, 127).to(torch.int8), scales


@torch.library.custom_op("lowbit_int8::linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x W^T + bias with both quantized: exact in int32, scaled in float32.

    x            (m, k)  float16 or bfloat16
    codes        (n, k)  int8
    scales       (n, 1)  float
    input_scale  one number, or None: each row gets its own
    return       (m, n)  x's dtype
    """
    m = x.shape[0]
    quantized, row_scales = quantize_rows(x, input_scale)
    if m < MIN_ROWS:
        quantized = torch.nn.functional.pad(quantized, (0, 0, 0, MIN_ROWS - m))
    sums = torch._int_mm(quantized, codes.T)[:m].float() * row_scales * scales.float().T
    if bias is not None:
        sums = sums + bias.float()
    return sums.to(x.dtype)


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])
