"""A packed weight written out dense: one operator, two devices, compared bitwise; and the product that starts there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops, reference, wna16_dequantize
from lowbit.quant.kernels.problem import PackedCall, Rotary
from tests.kernels.make import assert_close_as_half, make_packed, make_x, on_cpu
from tests.kernels.test_ops import make_rotary


def test_the_cpu_rounds_the_exact_weight_once() -> None:
    packed = make_packed(24, 160, 4, 32, symmetric=False, dtype=torch.bfloat16)
    assert ops.dequantize(packed).shape == (24, 160)
    assert ops.dequantize(packed).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_devices_agree_bitwise(bits: int, group_size: int, dtype: torch.dtype) -> None:
    for symmetric in (True, False):
        for n, k, pair_block in ((40, 768, 16), (256, 512, 256), (96, 256, 32)):
            packed = make_packed(n, k, bits, group_size, symmetric, dtype, "cuda", pair_block)
            assert torch.equal(ops.dequantize(packed).cpu(), ops.dequantize(on_cpu(packed)))


def epilogues(m: int, n: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Epilogues of a product: each alone, and some combined."""
    bias: Tensor = make_x(1, n, dtype, device)[0]
    residual, gamma = make_x(m, n, dtype, device), make_x(1, 128, dtype, device)[0]
    parts = [{}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}, {"float32_out": True}]
    parts += [{"activation": "gelu"}, {"activation": "gelu", "bias": bias, "residual": residual}]
    return [*parts, {"norm": "rms", "norm_weight": gamma, "norm_eps": 1e-5, "residual": residual}]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_epilogue_errs_no_more_than_when_it_follows_in_float32(dtype: torch.dtype, device: str) -> None:
    m, k = 70, 128
    for n, pair_block, activation in ((72, 16, None), (96, 96, "silu_mul")):
        weight = make_packed(n, k, dtype=dtype, device=device, pair_block=pair_block)
        x, dense = make_x(m, k, dtype, device), reference.dequantize_packed(weight)
        gated = [{"activation": activation}, {"activation": activation, "bias": make_x(1, n, dtype, device)[0]}]
        for parts in gated if activation else epilogues(m, n, dtype, device):
            call = PackedCall(x, weight, **parts)
            y = wna16_dequantize.run(call)
            assert y.dtype == call.y_dtype
            assert tuple(y.shape) == call.y_shape
            assert_close_as_half(y, reference.compute(call, dense).double(), reference.compute(call, dense.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_heads_turn_behind_the_product_and_go_to_the_cache(dtype: torch.dtype, device: str) -> None:
    weight, x = make_packed(128, 128, dtype=dtype, device=device, pair_block=32), make_x(70, 128, dtype, device)
    dense, bias = reference.dequantize_packed(weight), make_x(1, 128, dtype, device)[0]
    found, wanted, plain = (make_rotary(70, 1, 32, dtype, device) for _ in range(3))
    wanted, plain = (replace(found, k_cache=r.k_cache, v_cache=r.v_cache) for r in (wanted, plain))
    heads = [wna16_dequantize.run(PackedCall(x, weight, bias, rotary=found))]
    heads.append(reference.compute(PackedCall(x, weight, bias, rotary=wanted), dense))
    heads.append(reference.compute(PackedCall(x, weight, bias, rotary=plain), dense.to(dtype)))
    for y, exact, torchs in (heads, *zip(caches_of(found), caches_of(wanted), caches_of(plain), strict=True)):
        assert_close_as_half(y, exact.double(), torchs)


def caches_of(rotary: Rotary) -> tuple[Tensor, Tensor]:
    return rotary.k_cache, rotary.v_cache
