"""Weights, activations and tolerances that the kernels' tests share."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.ops import Operator
from lowbit.quant.kernels.packed import PackedWeight, prepack
from lowbit.quant.kernels.problem import PackedCall
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.w8a8 import W8a8Call, W8a8Weight, pack_w8a8
from lowbit.quant.kernels.weight import Linear, inputs_of, pack
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme, make_scheme, parse_scheme


def rounded_weight(n: int, k: int, scheme: Scheme, device: str = "cpu", scales: torch.dtype = torch.float16) -> QTensor:
    """A random weight with one row of zeros and one input 50 times larger than the rest."""
    w = torch.randn(n, k, device=device) * 0.05
    w[n // 2] = 0
    w[:, k // 3] *= 50
    return round_to_nearest(w, scheme, scales)


def make_qtensor(n: int, k: int, bits: int, group_size: int, symmetric: bool, device: str = "cpu") -> QTensor:
    """A random weight of integers with scales in float16: see rounded_weight."""
    return rounded_weight(n, k, make_scheme(bits, group_size, symmetric), device)


def make_packed(
    n: int,
    k: int,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    pair_block: int = 16,
) -> PackedWeight:
    return prepack(make_qtensor(n, k, bits, group_size, symmetric, device), dtype, pair_block)


def make_float(
    scheme: str,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    pair_block: int = 16,
) -> PackedWeight:
    """A random weight of a scheme of floats with scales in bfloat16: see rounded_weight."""
    return prepack(rounded_weight(n, k, parse_scheme(scheme).weights_only, device, torch.bfloat16), dtype, pair_block)


def make_linear(scheme: str, n: int = 64, k: int = 128) -> tuple[Linear, Tensor]:
    """A linear in half precision with a bias, and its weight in float32; inputs that share a scale have 0.03."""
    kind = parse_scheme(scheme)
    plain = round_to_nearest(torch.randn(n, k) / 8, kind.weights_only, torch.float16)
    scale = torch.tensor(0.03) if kind.static_inputs else None
    weight = QTensor(plain.codes, plain.scales, plain.zeros, kind, scale)
    return Linear(pack(weight, torch.float16), torch.randn(n).half(), inputs_of(weight)), weight.dequantize()


def make_x(m: int, k: int, dtype: torch.dtype, device: str = "cpu", outliers: bool = False) -> Tensor:
    """Random activations; with `outliers`, a few inputs are 60 times larger, as in real models."""
    x = torch.randn(m, k, device=device)
    if outliers:
        x[:, :: max(1, k // 5)] *= 60
    return x.to(dtype)


def assert_close_as_half(y: Tensor, exact: Tensor, half: Tensor) -> None:
    """House gate: y errs against `exact` (float64) at most twice as much as `half`, torch's own half-precision result.

    The slack is one rounding of the largest result to y's dtype, which an exact y may owe.
    """
    slack = torch.finfo(y.dtype).eps * exact.abs().max()
    limit = 2 * (half.double() - exact).abs().max() + slack
    error = (y.double() - exact).abs().max()
    assert torch.isfinite(y).all()
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"


def on_cpu(value):
    """A copy of a tensor, or of all that a call holds, on the CPU."""
    if is_dataclass(value):
        return replace(value, **{field.name: on_cpu(getattr(value, field.name)) for field in fields(value)})
    return value.cpu().clone() if isinstance(value, Tensor) else value


def opcheck(operator: Operator, call: Any) -> None:
    """torch's checks of an operator: schema, shapes while tracing, aliases, dispatch."""
    torch.library.opcheck(operator.torch, tuple(operator.arguments(call)))


def w8a8_call(
    x: Tensor,
    weight: W8a8Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    dependent: bool = False,
) -> W8a8Call:
    """The product of rows x in halves, rounded to the weight's number by a kernel of its own, which the product waits
    for."""
    how = {"rounding": weight.number.name, "input_scale": input_scale, "grouped": weight.in_blocks}
    rows = ops.quantize_rows(Rows(x, **how, dependent=dependent))
    return W8a8Call(*rows, weight, bias, residual, x.dtype, dependent=True)


def assert_devices_agree(y: Tensor, expected: Tensor) -> None:
    """One operator on two devices: results agree within two roundings of the largest."""
    scale = expected.abs().max().float() + 1e-6
    tolerance = 2 * torch.finfo(expected.dtype).eps
    assert (y.cpu().float() - expected.float()).abs().max() <= tolerance * scale


def assert_heads_agree(call: PackedCall) -> None:
    """The product and the keys and values that it appends, on two devices."""
    copy = on_cpu(call)
    assert_devices_agree(ops.linear(call), ops.linear(copy))
    assert call.rotary is not None
    assert_devices_agree(call.rotary.k_cache, copy.rotary.k_cache)
    assert_devices_agree(call.rotary.v_cache, copy.rotary.v_cache)


def make_w8a8_weight(n: int, k: int, device: str = "cpu", scheme: str = "int8") -> W8a8Weight:
    return pack_w8a8(rounded_weight(n, k, parse_scheme(scheme), device))


def assert_dependence_changes_nothing(compute: Callable[[bool], Tensor]) -> None:
    """compute(dependent) gives the same bits without dependent launches, with them, and replayed from a graph."""
    expected = compute(False)
    assert torch.equal(compute(True), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compute(True)
    for _ in range(10):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


def assert_streams_agree(compute: Callable[[], Tensor]) -> None:
    """compute() gives the same bits on another stream, which alone is waited for."""
    expected, stream = compute(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        y = compute()
    stream.synchronize()
    assert torch.equal(y, expected)
