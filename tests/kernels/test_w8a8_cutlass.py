"""The int8 product for many rows: every tile against integers, and the operator on two devices."""

from dataclasses import replace

import pytest
import torch

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.problem import Problem
from lowbit.quant.kernels.w8a8 import W8a8Call, W8a8Weight
from lowbit.quant.kernels.w8a8_cutlass import TILES, CutlassCut, choose_cut, reason_against, run
from tests.kernels.make import assert_devices_agree, make_w8a8_weight, make_x, on_cpu
from tests.kernels.test_w8a8_gemm import random_codes

ON_H100 = Problem(1024, 4096, 4096, 8, -1, torch.float16, "cuda", (9, 0), 132, code_inputs=True)


def test_what_it_leaves_to_others_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.quant.kernels.w8a8_gemm.reason_against", lambda problem: None)
    assert reason_against(ON_H100) is None
    assert "faster below" in (reason_against(replace(ON_H100, m=16)) or "")
    assert "multiples of 8" in (reason_against(replace(ON_H100, n=99)) or "")
    assert "writes halves" in (reason_against(replace(ON_H100, dtype=torch.float32)) or "")


@pytest.mark.parametrize("m", [129, 512, 4096])
def test_the_rule_knows_its_tiles(m: int) -> None:
    assert choose_cut(replace(ON_H100, m=m)).tile < len(TILES)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(TILES)))
@pytest.mark.parametrize("swizzle", [1, 4])
def test_sums_are_exact_integers(tile: int, swizzle: int) -> None:
    # small codes, so that bfloat16 and float16 hold the sums: up to 2 * 16 * 4 and 2 * 256 * 4
    for dtype, k in ((torch.bfloat16, 16), (torch.float16, 256)):
        for m, n in ((1, 8), (130, 264), (511, 4096)):
            weight = W8a8Weight(random_codes(n, k).remainder(3), torch.ones(n, device="cuda"))
            x = random_codes(m, k).remainder(5) - 2
            call = W8a8Call(x, torch.ones(m, device="cuda"), weight, dtype=dtype)
            y = run(call, call.problem(), CutlassCut(tile, swizzle))
            assert torch.equal(y.double(), x.double() @ weight.codes.double().T)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", range(len(TILES)))
def test_scales_bias_and_residual(tile: int, dtype: torch.dtype) -> None:
    m, n, k = 300, 1032, 4096
    weight, x = make_w8a8_weight(n, k, "cuda"), make_x(m, k, dtype, "cuda", outliers=True)
    bias, residual = make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
    codes, x_scales = ops.quantize_rows(ops.Rows(x, rounding="int8"))
    for tail in ((None, None), (bias, None), (None, residual), (bias, residual)):
        call = W8a8Call(codes, x_scales, weight, *tail, dtype)
        expected = ops.w8a8_linear(on_cpu(call))
        assert_devices_agree(run(call, call.problem(), CutlassCut(tile, 1)), expected)
        assert_devices_agree(ops.w8a8_linear(call), expected)
