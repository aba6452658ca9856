"""Preparation of a product's input rows in one kernel: activation, norm and rounding to int8 or FP8, each if
requested."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.quant.kernels.extension import launch, reason_against_device
from lowbit.quant.kernels.packed import shuffled
from lowbit.quant.kernels.problem import ACTIVATIONS, NORMS
from lowbit.quant.kernels.reference import activate
from lowbit.quant.numbers import NUMBERS
from lowbit.quant.numerics import fake_quantize_inputs, quantize_inputs

MAX_K = 32768
# So few rows of so many numbers are rounded by several blocks each. Steps of Llama-2-7B in W8A8 on an H200, us, at 1 x
# 128 and 8 x 128: 2135 and 2439 with one block, 2118 and 2388 with 4, 2122 and 2402 with 8; with 4 from 8192 numbers on
# 2125 and 2407.
FEW_ROWS, LONG_ROW, PARTS = 16, 4096, 4
ROUNDINGS = ("none", "int8", "fp8")
GROUP = 128  # adjacent inputs with a scale of their own


@dataclass(frozen=True)
class Rows:
    """y = rounded(norm(activation(x))), in x's dtype.

    x           (m, k); for "silu_mul" (m, 2 k), the gate followed by the values it multiplies
    norm        "none", "rms" or "layer", with its weight, bias (k) and eps
    rounding    "none", or "int8" or "fp8": to that number (numerics.quantize_inputs), by input_scale, one float32, or
                if that is None by each row's absmax / the largest code. `run` returns the rounded values, `quantize`
                the codes and one scale per row
    grouped     such a scale for each GROUP inputs of a row, without input_scale: k is a multiple of it
    activation  one of problem.ACTIVATIONS, with its result rounded to x's dtype
    shuffled    codes of int8 are in packed.shuffled's order
    """

    x: Tensor
    norm: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    rounding: str = "none"
    input_scale: Tensor | None = None
    dependent: bool = False
    activation: str = "none"
    grouped: bool = False
    shuffled: bool = False

    @property
    def is_done(self) -> bool:
        """True if y is x."""
        return (self.norm, self.rounding, self.activation) == ("none", "none", "none")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k)"""
        m, width = self.x.shape
        return m, width // 2 if self.activation == "silu_mul" else width

    def empty(self) -> Tensor:
        """Memory for y."""
        return self.x.new_empty(self.shape)

    def empty_codes(self) -> tuple[Tensor, Tensor]:
        """Memory for codes and scales."""
        m, k = self.shape
        codes = self.x.new_empty(m, k, dtype=NUMBERS[self.rounding].storage)
        return codes, self.x.new_empty((k // GROUP, m) if self.grouped else m, dtype=torch.float32)


def run(call: Rows) -> Tensor:
    """y of `call`. ValueError if its parts do not fit together."""
    check(call)
    if reason_against(call):
        return reference(call)
    y = call.empty()
    run_kernel(call, y=y)
    return y


def quantize(call: Rows) -> tuple[Tensor, Tensor]:
    """Codes (m, k) and scales (m) or, in groups, (k / GROUP, m) float32 of `call`. ValueError if its parts do not fit
    together."""
    check(call)
    if call.rounding == "none":
        raise ValueError("rounding is 'none': codes need 'int8' or 'fp8'")
    if reason_against(call):
        return reference_codes(call)
    codes, scales = call.empty_codes()
    run_kernel(call, codes=codes, scales=scales)
    return codes, scales


def run_kernel(call: Rows, y: Tensor | None = None, codes: Tensor | None = None, scales: Tensor | None = None) -> None:
    """Run the kernel on `call`, which `check` has passed."""
    m, k = call.shape
    names = ("x", "norm", "weight", "bias", "eps", "rounding", "input_scale", "activation", "grouped", "shuffled")
    args = {name: getattr(call, name) for name in names}
    args |= {"m": m, "k": k, "y": y, "codes": codes, "scales": scales}
    cut = {"parts": parts_of(call), "dependent": call.dependent}
    launch("row_norm", call.x.dtype, device=call.x.device, args=args, **cut)


def parts_of(call: Rows) -> int:
    """Blocks that share a row: few long rows leave most of the GPU idle, and a block's arithmetic takes longer than its
    reads. Rows with a norm are not shared."""
    m, k = call.shape
    alone = call.norm != "none" or call.rounding == "none" or call.input_scale is not None or call.grouped
    clusters_exist = torch.cuda.get_device_properties(call.x.device).major >= 9
    return 1 if alone or not clusters_exist or m > FEW_ROWS or k < LONG_ROW else PARTS


def check(call: Rows) -> None:
    """ValueError if the parts of `call` do not fit together."""
    if call.activation not in ACTIVATIONS:
        raise ValueError(f"activation {call.activation!r} is none of {ACTIVATIONS}")
    if call.x.ndim != 2 or (call.activation == "silu_mul" and call.x.shape[1] % 2):
        raise ValueError(f"x has the shape {tuple(call.x.shape)}: rows are needed, of even width for silu_mul")
    k = call.shape[1]
    if call.norm not in NORMS or (call.norm == "none") != (call.weight is None):
        raise ValueError(f"norm {call.norm!r} is one of {NORMS}, and has a weight unless it is 'none'")
    if call.rounding not in ROUNDINGS or (call.rounding == "none" and call.input_scale is not None):
        raise ValueError(f"rounding {call.rounding!r} is one of {ROUNDINGS}, and has no input_scale where it is 'none'")
    if call.grouped and (call.rounding == "none" or call.input_scale is not None or k % GROUP):
        raise ValueError(
            f"rounding {call.rounding!r} of rows of {k} in groups of {GROUP}: they must divide the row, and have no "
            "input_scale"
        )
    if call.shuffled and (call.rounding != "int8" or call.grouped or k % 32):
        raise ValueError(f"shuffled rows of {k} in {call.rounding}: int8 and multiples of 32 inputs are shuffled")
    for name, tensor in (("weight", call.weight), ("bias", call.bias)):
        if tensor is not None and (tuple(tensor.shape) != (k,) or tensor.dtype != call.x.dtype):
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not ({k},) {call.x.dtype}")
    for name, tensor in (("weight", call.weight), ("bias", call.bias), ("input_scale", call.input_scale)):
        if tensor is not None and tensor.device != call.x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {call.x.device}: they must be on one device")
    scale = call.input_scale
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(f"input_scale is {tuple(scale.shape)} {scale.dtype}, not one number of torch.float32")


def reason_against(call: Rows) -> str | None:
    """The reason why the kernel cannot run on these rows, or None."""
    x = call.x
    if x.device.type != "cuda":
        return f"the tensors are on the {x.device.type}"
    vectors = [tensor for tensor in (x, call.weight, call.bias) if tensor is not None]
    aligned = all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in vectors)
    if x.dtype not in (torch.float16, torch.bfloat16) or not aligned:
        return "the kernel takes contiguous rows of torch.float16 or torch.bfloat16, aligned to 16 bytes"
    m, k = call.shape
    if k % 8 or not 0 < k <= MAX_K or not m:
        return f"rows of {k}: multiples of 8 up to {MAX_K} are taken"
    properties = torch.cuda.get_device_properties(x.device)
    return reason_against_device((properties.major, properties.minor))


def prepared(call: Rows) -> Tensor:
    """norm(activation(x)) in plain torch, in x's dtype."""
    y = call.x
    if call.activation != "none":
        y = activate(y.float(), call.activation).to(y.dtype)
    if call.norm == "rms":
        return functional.rms_norm(y, y.shape[-1:], call.weight, call.eps)
    if call.norm == "layer":
        return functional.layer_norm(y, y.shape[-1:], call.weight, call.bias, call.eps)
    return y


def reference(call: Rows) -> Tensor:
    """y of `call` in plain torch."""
    y = prepared(call)
    if call.rounding == "none":
        return y.clone() if y is call.x else y
    if call.grouped:
        return fake_quantize_inputs(y.unflatten(1, (-1, GROUP)), NUMBERS[call.rounding]).flatten(1)
    return fake_quantize_inputs(y, NUMBERS[call.rounding], call.input_scale)


def reference_codes(call: Rows) -> tuple[Tensor, Tensor]:
    """Codes and scales of `call` in plain torch."""
    y, number = prepared(call), NUMBERS[call.rounding]
    if call.grouped:
        codes, scales = quantize_inputs(y.unflatten(1, (-1, GROUP)), number)
        return codes.flatten(1), scales.squeeze(-1).T.contiguous()
    codes, scales = quantize_inputs(y, number, call.input_scale)
    codes = shuffled(codes) if call.shuffled else codes
    return codes, scales.reshape(-1).expand(call.shape[0]).contiguous()
