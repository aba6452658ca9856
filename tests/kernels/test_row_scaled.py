"""Weights of floats in the kernels' order: codes and scales come back exactly, every code expands exactly, products
agree with the reference, and scales that do not fit are refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops, reference, wna16_gemm, wna16_gemv
from lowbit.quant.kernels.packed import HALF, PackedWeight, dequantize_packed, prepack, unprepack
from lowbit.quant.kernels.problem import Deferred, PackedCall
from lowbit.quant.kernels.row_scaled import row_scaled, stacked_rows
from lowbit.quant.kernels.wna16_gemv import CROWD, CROWDS, GemvCut
from lowbit.quant.numbers import FP8
from lowbit.quant.packing import fp4_codes
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.kernels.make import (
    assert_close_as_half,
    assert_dependence_changes_nothing,
    assert_devices_agree,
    assert_heads_agree,
    make_float,
    make_x,
    on_cpu,
    opcheck,
)
from tests.kernels.test_ops import make_rotary

SCHEMES = ("fp8-a16", "fp8-block-a16", "mxfp8-a16", "nvfp4-a16", "mxfp4-a16")
SHAPES = [(64, 256, 16), (33, 160, 16), (1, 32, 16), (96, 384, 96), (64, 128, 32)]
PLACES = 8  # codes that a kernel expands together
hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="wna16_gemm is for sm_90"
)


def rounded(scheme: str, n: int, k: int) -> QTensor:
    w = torch.randn(n, k) * 0.05
    w[n // 2] = 0
    w[:, k // 3] *= 50
    return round_to_nearest(w, parse_scheme(scheme), torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_values_come_back(scheme: str) -> None:
    for n, k, pair_block in SHAPES:
        weight = rounded(scheme, n, k)
        for dtype in HALF:
            packed = prepack(weight, dtype, pair_block)
            back = unprepack(packed)
            assert packed.dtype == dtype
            assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
            assert torch.equal(back.dequantize(), weight.dequantize())
            assert torch.equal(ops.dequantize(packed), weight.dequantize(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_stacked_and_taken_with_their_scales(scheme: str) -> None:
    parts = [rounded(scheme, n, 160) for n in (40, 7)]
    parts[1] = replace(parts[1], divisor=None if parts[1].divisor is None else parts[1].divisor / 64)
    rows, dense = torch.randperm(47), torch.cat([part.dequantize() for part in parts])
    stacked = stacked_rows([row_scaled(part) for part in parts])
    assert torch.equal(stacked.dequantize(), dense)
    assert torch.equal(stacked.taking(rows).dequantize(), dense[rows])


def all_codes(scheme: str) -> QTensor:
    """Every code in each of the 8 places that are expanded together, with every scale that a row may have."""
    kind = parse_scheme(scheme)
    every = torch.arange(256, dtype=torch.uint8).view(FP8.storage)
    codes = every[every.float().isfinite()] if kind.number == FP8 else fp4_codes(torch.arange(16))
    row = codes.view(torch.uint8).repeat_interleave(PLACES + 1)  # 9 is odd: all places
    row = torch.nn.functional.pad(row, (0, -len(row) % 128)).view(FP8.storage)
    codes, n = row.expand(256, -1).contiguous(), 256
    sides = kind.sides(n, codes.shape[1])
    places = torch.arange(sides[0]).unsqueeze(1) + torch.arange(sides[1])
    scales = torch.ldexp(torch.ones(sides), -places.remainder(13))
    if kind.weights.parent:
        scales = every[1:127].float()[places.remainder(126)]
    divisor = torch.tensor(2.0) if kind.weights.parent else None
    return QTensor(codes, scales.bfloat16(), None, kind, divisor=divisor)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_code_with_every_scale_is_exact(scheme: str, dtype: torch.dtype, device: str) -> None:
    weight = all_codes(scheme)
    packed = prepack(weight.to(device), dtype)
    assert torch.equal(ops.dequantize(packed).cpu(), weight.dequantize(dtype))
    if device == "cuda":  # a unit vector takes each column of the weight as the products expand it
        k, dense = weight.shape[1], weight.dequantize().to(device)
        for start in range(0, k, 8):
            x = torch.zeros(8, k, dtype=dtype, device=device)
            x[range(8), range(start, start + 8)] = 1
            call = PackedCall(x, packed, float32_out=True)
            assert torch.equal(wna16_gemv.run(call, call.problem()), dense[:, start : start + 8].T)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["mxfp4-a16", "nvfp4-a16"])
@pytest.mark.parametrize("dtype", HALF)
def test_every_code_with_every_scale_is_exact_in_one_row(scheme: str, dtype: torch.dtype) -> None:
    weight = all_codes(scheme)
    packed, dense = prepack(weight.to("cuda"), dtype), weight.dequantize().cuda()
    for column, x in enumerate(torch.eye(weight.shape[1], dtype=dtype, device="cuda")):
        call = PackedCall(x.unsqueeze(0), packed, float32_out=True)
        for cut in (GemvCut(1, 1, 1, 1, CROWD), *(GemvCut(2, 1, 1, 1, room) for room in CROWDS)):
            assert torch.equal(wna16_gemv.run(call, call.problem(), cut)[0], dense[:, column])


def check(call: PackedCall, y: Tensor) -> None:
    """y of a plain product, under the house's gate."""
    dense = reference.dequantize_packed(call.weight)
    assert_close_as_half(y, call.x.double() @ dense.double().T, call.x @ dense.to(call.weight.dtype).T)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", HALF)
def test_few_rows(scheme: str, dtype: torch.dtype) -> None:
    for n, k in ((96, 1280), (40, 96), (1000, 4128), (4096, 4096)):
        weight = make_float(scheme, n, k, dtype, "cuda")
        for m in (1, 3, 8, 9, 16):
            for outliers in (False, True):
                call = PackedCall(make_x(m, k, dtype, "cuda", outliers), weight)
                check(call, wna16_gemv.run(call, call.problem()))
    weight = make_float(scheme, 200, 1664, dtype, "cuda")
    for m in (1, 8):
        call = PackedCall(make_x(m, 1664, dtype, "cuda"), weight)
        for row_tiles, cluster in ((1, 1), (2, 1), (1, 3), (2, 8)):
            for row_warps, k_warps in ((1, 1), (1, 8), (4, 2)):
                check(call, wna16_gemv.run(call, call.problem(), GemvCut(row_tiles, row_warps, k_warps, cluster)))
        for row_warps, k_warps, cluster in ((1, 1, 1), (1, 12, 1), (4, 3, 1), (2, 4, 2)):
            check(call, wna16_gemv.run(call, call.problem(), GemvCut(1, row_warps, k_warps, cluster, CROWD)))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["mxfp4-a16", "nvfp4-a16"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("room", CROWDS)
def test_every_cut_of_two_tiles_for_one_row(scheme: str, dtype: torch.dtype, room: int) -> None:
    weight = make_float(scheme, 200, 1664, dtype, "cuda")
    for row_warps, k_warps, cluster in ((1, 1, 1), (1, 12, 1), (2, 4, 1), (2, 3, 2), (1, 8, 3)):
        for outliers in (False, True):
            call = PackedCall(make_x(1, 1664, dtype, "cuda", outliers), weight)
            check(call, wna16_gemv.run(call, call.problem(), GemvCut(2, row_warps, k_warps, cluster, room)))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", HALF)
def test_more_rows(scheme: str, dtype: torch.dtype) -> None:
    for n, k in ((160, 1280), (40, 96), (1000, 4128), (4096, 4096)):
        weight = make_float(scheme, n, k, dtype, "cuda")
        for m in (1, 9, 17, 33, 64):
            for outliers in (False, True):
                call = PackedCall(make_x(m, k, dtype, "cuda", outliers), weight)
                check(call, wna16_gemm.run(call, call.problem()))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [1, 8, 40, 255])
def test_epilogues(scheme: str, m: int) -> None:
    n, k, dtype = 96, 512, torch.bfloat16 if m == 8 else torch.float16
    weight = make_float(scheme, n, k, dtype, "cuda")
    bias, residual = make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
    x, gamma = make_x(m, k, dtype, "cuda") / 8, make_x(1, k, dtype, "cuda")[0]
    calls = [PackedCall(x, weight, bias, residual, activation=name) for name in ("none", "gelu", "quick_gelu")]
    calls += [PackedCall(x, weight, bias, norm="rms", norm_weight=gamma / 8, norm_eps=1e-5, float32_out=True)]
    calls += [PackedCall(x, weight, deferred=Deferred(torch.rand(m, k // 16, device="cuda") * 40, 1e-3))]
    gated = make_float(scheme, n, k, dtype, "cuda", pair_block=n)
    calls += [PackedCall(x, gated, activation="silu_mul")]
    for call in calls:
        assert_devices_agree(ops.linear(call).to(dtype), ops.linear(on_cpu(call)).to(dtype))
    heads = make_float(scheme, 6 * 32, k, dtype, "cuda", pair_block=32)
    call = PackedCall(x, heads, rotary=make_rotary(min(m, 64), 2, 32, dtype, "cuda"))
    call = replace(call, x=x[:64])
    assert_heads_agree(call)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dependent_launches_and_graphs_change_no_bit(scheme: str) -> None:
    weight, x = make_float(scheme, 512, 4096, device="cuda"), make_x(3, 4096, torch.float16, "cuda")
    assert_dependence_changes_nothing(lambda dependent: ops.linear(PackedCall(x, weight, dependent=dependent)))


@pytest.mark.parametrize("scheme", ["fp8-a16", "nvfp4-a16"])
def test_operators_take_floats(scheme: str) -> None:
    weight = make_float(scheme, 48, 160)
    opcheck(ops.plain_linear, PackedCall(make_x(2, 160, torch.float16), weight))
    opcheck(ops.dequantize, weight)


@pytest.mark.parametrize(
    ("scheme", "scales", "reason"),
    [
        ("mxfp4-a16", [2.0**-30, 2.0**3], "scales of row 0 reach from 9.31e-10 to 8"),
        ("mxfp8-a16", [2.0**-12, 2.0**3], "scales of row 0 reach from 0.000244 to 8"),
    ],
)
def test_scales_too_far_apart_are_refused(scheme: str, scales: list[float], reason: str) -> None:
    kind = parse_scheme(scheme)
    codes = kind.number.encode(torch.ones(16, 64))
    far = QTensor(codes, torch.tensor(scales).bfloat16().expand(16, -1).contiguous(), None, kind)
    with pytest.raises(ValueError, match=reason):
        prepack(far, torch.float16)
    codes[:, :32] = 0  # a scale that no code uses may be anything
    packed = prepack(replace(far, codes=codes), torch.float16)
    assert torch.equal(dequantize_packed(packed), replace(far, codes=codes).dequantize())


def test_tensors_of_another_kind_are_refused() -> None:
    weight, x = make_float("nvfp4-a16", 16, 64), make_x(1, 64, torch.float16)
    for broken, reason in (
        (replace(weight, factors=weight.factors[:, :4]), "factors of shape"),
        (replace(weight, scales=weight.scales[..., :1]), "scales of shape"),
        (replace(weight, inputs=torch.bfloat16), "packed for inputs in torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.linear(PackedCall(x, broken))


def test_bytes_are_those_of_codes_scales_and_factors() -> None:
    def bytes_of(weight: PackedWeight) -> int:
        return weight.nbytes - weight.words.nbytes - 64

    assert bytes_of(make_float("fp8-a16", 16, 128)) == 0
    assert bytes_of(make_float("fp8-block-a16", 16, 128)) == 32
    assert bytes_of(make_float("nvfp4-a16", 16, 128)) == 128
    assert bytes_of(make_float("mxfp4-a16", 16, 128)) == 64
