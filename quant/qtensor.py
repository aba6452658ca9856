"""A quantized weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.scheme import Scheme

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QTensor:
    """A weight as codes and scales: `w ~ (code - zero) * scale`.

    codes        (n, k)  in the number's storage; unpacked
    scales       (n, g)  float16, bfloat16 or float32, finite and not zero; positive unless the number has signed scales
    zeros        (n, g)  int32 between the number's limits; None if the scheme is symmetric
    input_scale  ()      float32, positive: `x ~ code * input_scale`; only in schemes with one scale for all inputs

    Checked on construction: ValueError, with numbers, if shapes, dtypes or values contradict the scheme.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        reason = self.reason_against()
        if reason:
            raise ValueError(f"a {self.scheme} weight of shape {tuple(self.codes.shape)} is impossible: {reason}")

    def reason_against(self) -> str | None:
        """The reason why these tensors are not a weight of this scheme, or None."""
        number = self.scheme.number
        dtype = number.storage
        if self.codes.ndim != 2 or self.codes.dtype != dtype:
            return f"codes must be 2-dimensional {dtype}, not {self.codes.ndim}-dimensional {self.codes.dtype}"
        n, k = self.codes.shape
        if self.scheme.group_size > 0 and k % self.scheme.group_size:
            return f"{k} inputs do not divide into groups of {self.scheme.group_size}"
        sides = (n, self.scheme.groups(k))
        if tuple(self.scales.shape) != sides:
            return f"scales have shape {tuple(self.scales.shape)}, not {sides}"
        if self.scales.dtype not in SCALE_DTYPES:
            return f"scales are {self.scales.dtype}, not float16, bfloat16 or float32"
        if (self.zeros is None) != self.scheme.symmetric:
            return "only asymmetric schemes have zeros, and they must have them"
        if self.zeros is not None and tuple(self.zeros.shape) != sides:
            return f"zeros have shape {tuple(self.zeros.shape)}, not {sides}"
        if (self.input_scale is None) == self.scheme.static_inputs:
            return "an input scale is required by schemes with one scale for all inputs (a8tensor), and only by them"
        if self.codes.is_meta or not n * k:
            return None
        if self.input_scale is not None and not bool((self.input_scale > 0) & torch.isfinite(self.input_scale)):
            return f"its input scale is {self.input_scale.tolist()}; one finite, positive number is needed"
        size = self.scales.abs() if number.signed_scales else self.scales
        if not bool((torch.isfinite(size) & (size > 0)).all()):
            return f"a scale is zero{'' if number.signed_scales else ', negative'} or not finite"
        for name, values in (("code", self.codes), ("zero", self.zeros)):
            reason = None if values is None else number.reason_against_codes(values)
            if reason:
                return f"a {name} {reason}"
        return None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Packed size in bytes: codes, scales and zeros."""
        side = self.scales.element_size() + (0 if self.zeros is None else self.scheme.bits / 8)
        return int(self.codes.numel() * self.scheme.bits / 8 + self.scales.numel() * side)

    def values(self) -> Tensor:
        """code - zero, (n, k) float32: the weight in units of its scales."""
        values = self.scheme.number.decode(self.codes)
        return values if self.zeros is None else values - numerics.per_weight(self.zeros, self.scheme, values)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (n, k), computed in float32 and rounded once to `dtype`."""
        return numerics.dequantize(self.codes, self.scheme, self.scales, self.zeros).to(dtype)

    def to(self, device: torch.device | str) -> "QTensor":
        zeros = None if self.zeros is None else self.zeros.to(device)
        input_scale = None if self.input_scale is None else self.input_scale.to(device)
        return QTensor(self.codes.to(device), self.scales.to(device), zeros, self.scheme, input_scale)


def round_to_nearest(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0) -> QTensor:
    """`w` (n, k) rounded to the nearest code; `shrink` as in numerics.choose_params."""
    scales, zeros = numerics.choose_params(w, scheme, scale_dtype, shrink)
    return QTensor(numerics.quantize(w, scheme, scales, zeros), scales, zeros, scheme)
