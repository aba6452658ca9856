"""A packed weight written out dense: one operator, two devices, compared bitwise."""

import pytest
import torch

from quant.kernels import ops
from tests.kernels.make import make_packed


def test_the_cpu_rounds_the_exact_weight_once() -> None:
    packed = make_packed(24, 160, 4, 32, symmetric=False, dtype=torch.bfloat16)
    assert ops.dequantize(packed).shape == (24, 160)
    assert ops.dequantize(packed).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_devices_agree_bitwise(bits: int, group_size: int, dtype: torch.dtype) -> None:
    for symmetric in (True, False):
        for n, k, pair_block in ((40, 768, 16), (256, 512, 256), (96, 256, 32)):
            packed = make_packed(n, k, bits, group_size, symmetric, dtype, "cuda", pair_block)
            args = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in ops.weight_args(packed)]
            expected = torch.ops.lowbit.dequantize(*args)
            assert torch.equal(ops.dequantize(packed).cpu(), expected)
