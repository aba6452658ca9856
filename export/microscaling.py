"""The tensors of floats with scales of few bits (NVFP4, MXFP4, MXFP8), in the form that several formats share.

codes   uint8 (n, k / 2) of fp4, two to a byte, or float8_e4m3fn (n, k)
scales  float8_e4m3fn (n, k / 16), or uint8 (n, k / 32) of e8m0
parent  float32 (1,): the divisor of e4m3 scales, or its reciprocal, depending on the format
"""

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.numbers import FP4, FP8
from lowbit.quant.packing import pack_e8m0, pack_fp4, unpack_e8m0, unpack_fp4
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, Side

LARGEST_WEIGHT, LARGEST_INPUT = 2.0**14, 2.0**20  # larger ones are not plausible: a factor must be a divisor


def stored_codes(weight: QTensor) -> Tensor:
    """The codes of `weight` in their form on disk."""
    return pack_fp4(weight.codes) if weight.scheme.number == FP4 else weight.codes


def stored_scales(weight: QTensor) -> Tensor:
    """The scales of `weight` in their form on disk."""
    if weight.scheme.weights.scales is None:
        return weight.scales
    return weight.scales.to(FP8.storage) if weight.scheme.weights.scales == FP8 else pack_e8m0(weight.scales)


def weight_of(
    codes: Tensor, scales: Tensor, scheme: Scheme, input_scale: Tensor | None = None, divisor: Tensor | None = None
) -> QTensor:
    """The weight of a file's codes and scales. ValueError if they do not fit the scheme."""
    if scheme.number == FP4:
        codes = unpack_fp4(_typed(codes, torch.uint8, "its packed codes"))
    if scheme.weights.scales == FP8:
        scales = _typed(scales, FP8.storage, "its scales").to(torch.bfloat16)
    elif scheme.weights.scales is not None:
        scales = unpack_e8m0(_typed(scales, torch.uint8, "its scales"))
    if scheme.weights.scales is not None and codes.ndim == 2 and scales.shape == scheme.sides(*codes.shape):
        scales = torch.where(_empty(codes, scheme) & (scales == 0), torch.ones_like(scales), scales)
    weight = QTensor(codes, scales, None, scheme, input_scale, divisor)
    _require_plausible(weight)
    return weight


def every_row(codes: Tensor, scales: Tensor) -> Tensor:
    """`scales`, with a single scale of the whole weight repeated for every row of `codes`."""
    return scales.reshape(1, 1).repeat(codes.shape[0], 1) if tuple(scales.shape) in ((), (1,)) else scales


def one_number(value: Tensor, what: str) -> Tensor:
    """`value` as () float32. ValueError unless it is one number."""
    if value.numel() != 1:
        raise ValueError(f"{what} has the shape {list(value.shape)}; one number is needed")
    return value.float().reshape(())


def _typed(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    if value.dtype != dtype:
        raise ValueError(f"{what} are {value.dtype}; {dtype} fits")
    return value


def _empty(codes: Tensor, scheme: Scheme) -> Tensor:
    """True for each group (n, g) of zeros; other programs store a scale of 0 there."""
    return numerics.grouped(codes.float(), scheme).abs().amax(-1) == 0


def _require_plausible(weight: QTensor) -> None:
    """ValueError if the scales allow implausibly large weights or inputs: they are reciprocals of what is meant.

    Scales that are powers of two are what they say in every format, however large.
    """
    side, inputs = weight.scheme.weights, weight.scheme.inputs
    if weight.scales.numel() and (side.scales is None or side.parent):
        _require_below(LARGEST_WEIGHT, "weights", side, weight.scales.float().amax(), weight.divisor)
    if inputs is not None and weight.input_scale is not None:
        if inputs.scales is None:
            _require_below(LARGEST_INPUT, "inputs", inputs, weight.input_scale)
        else:
            _require_below(LARGEST_INPUT, "inputs", inputs, torch.tensor(inputs.scales.high), weight.input_scale)


def _require_below(limit: float, what: str, side: Side, scale: Tensor, divisor: Tensor | None = None) -> None:
    """ValueError if the largest code of `side` by `scale` stands for more than `limit`."""
    largest = float(side.number.high * (scale if divisor is None else scale / divisor))
    if largest > limit:
        by = "scale" if divisor is None else f"global scale of {float(divisor):g}"
        raise ValueError(
            f"its {by} allows {what} of up to {largest:.3g}: the file seems to have the reciprocal of what its format "
            "asks for"
        )
