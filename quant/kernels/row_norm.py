"""Rows on their way into a product: normed, and rounded to int8 where the weight's scheme says so."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quant.kernels.extension import EXTENSION, reason_against_device
from quant.kernels.problem import NORMS
from quant.numerics import fake_quantize_inputs

MAX_K = 32768


@dataclass(frozen=True)
class Rows:
    """y = rounded(norm(x)), in x's dtype.

    x       (m, k)
    norm    "none", "rms" or "layer", with its weight, bias (k) and eps
    int8    "none"; "token": to multiples of each row's absmax / 127; "tensor": of input_scale, a float32 number.
            -127 to 127 of them; what comes out are the values that the codes stand for (numerics.quantize_inputs)
    """

    x: Tensor
    norm: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    int8: str = "none"
    input_scale: Tensor | None = None
    dependent: bool = False


def run(call: Rows) -> Tensor:
    """y of `call`. ValueError where its parts do not go together."""
    check(call)
    if reason_against(call):
        return reference(call)
    assert EXTENSION is not None
    x = call.x
    y = torch.empty_like(x)
    args = EXTENSION.RowNormArgs()
    tensors = {"x": x, "weight": call.weight, "bias": call.bias, "input_scale": call.input_scale, "y": y}
    for name, tensor in tensors.items():
        setattr(args, name, 0 if tensor is None else tensor.data_ptr())
    args.m, args.k = x.shape
    args.norm, args.eps, args.int8 = NORMS.index(call.norm), call.eps, call.int8 != "none"
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        EXTENSION.row_norm(x.dtype == torch.bfloat16, args, x.device.index, call.dependent, stream)
    return y


def check(call: Rows) -> None:
    """Raises ValueError where the parts of `call` do not go together."""
    k = call.x.shape[-1]
    if call.norm not in NORMS or (call.norm == "none") != (call.weight is None):
        raise ValueError(f"norm {call.norm!r} is one of {NORMS}, and has a weight unless it is 'none'")
    if call.int8 not in ("none", "token", "tensor") or (call.int8 == "tensor") != (call.input_scale is not None):
        raise ValueError(f"int8 {call.int8!r} is none, token or tensor, and has an input_scale where it is 'tensor'")
    for name, tensor in (("weight", call.weight), ("bias", call.bias)):
        if tensor is not None and (tuple(tensor.shape) != (k,) or tensor.dtype != call.x.dtype):
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not ({k},) {call.x.dtype}")


def reason_against(call: Rows) -> str | None:
    """Why the kernel cannot take these rows, or None."""
    x = call.x
    if x.device.type != "cuda":
        return f"the tensors are on the {x.device.type}"
    if x.dtype not in (torch.float16, torch.bfloat16) or x.ndim != 2 or not x.is_contiguous():
        return "the kernel takes contiguous rows of torch.float16 or torch.bfloat16"
    if x.shape[1] % 8 or not 0 < x.shape[1] <= MAX_K or not x.shape[0]:
        return f"rows of {x.shape[1]}: multiples of 8 up to {MAX_K} are taken"
    properties = torch.cuda.get_device_properties(x.device)
    return reason_against_device((properties.major, properties.minor))


def reference(call: Rows) -> Tensor:
    """y of `call` in plain torch."""
    y = call.x
    if call.norm == "rms":
        y = functional.rms_norm(y, y.shape[-1:], call.weight, call.eps)
    elif call.norm == "layer":
        y = functional.layer_norm(y, y.shape[-1:], call.weight, call.bias, call.eps)
    if call.int8 == "none":
        return y.clone() if y is call.x else y
    return fake_quantize_inputs(y, call.input_scale)
