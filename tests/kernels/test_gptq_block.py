"""quant/kernels/gptq_block.py: the loop on the CPU and the kernel on a GPU, bit by bit where arithmetic allows."""

import pytest
import torch

from lowbit.quant.kernels import ops
from lowbit.quant.numbers import INT4, UINT4


def block(n: int, b: int, device: str = "cpu", zero: float = 0.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(n + b)
    x = torch.randn(4 * b, b)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / len(x) + 0.1 * torch.eye(b)), upper=True)
    tensors = (torch.randn(n, b), factor, torch.rand(n, b) * 0.2 + 0.1, torch.full((n, b), zero))
    return tuple(tensor.to(device) for tensor in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, f, s, z: (w.double(), f, s, z), "w is torch.float64"),
        (lambda w, f, s, z: (w, f[:3], s, z), r"factor is torch.float32 \[3, 8\] on cpu; float32 \[8, 8\]"),
        (lambda w, f, s, z: (w, f, s.half(), z), "scales is torch.float16"),
        (lambda w, f, s, z: (w, f, s, z[:1]), r"zeros is torch.float32 \[1, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ops.round_block(*change(*block(4, 8)), INT4)


def test_a_block_too_wide_is_refused():
    with pytest.raises(ValueError, match="a block of 129 columns; at most 128 fit"):
        ops.round_block(*block(2, 129), INT4)


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0.0, 7.0])
@pytest.mark.parametrize(("n", "b"), [(1, 128), (7, 128), (64, 96), (300, 33), (4096, 128), (5, 1)])
def test_the_kernel_rounds_as_the_loop_does(n, b, zero):
    number = UINT4 if zero else INT4
    codes, errors = ops.round_block(*block(n, b, "cuda", zero), number)
    wanted_codes, wanted_errors = ops.round_block(*block(n, b, "cpu", zero), number)
    same = (codes.cpu() == wanted_codes).all(1)
    # a fused multiply-add may tip a value that lies between two codes; the rest of its row then differs rightly
    assert same.float().mean() > 0.98
    torch.testing.assert_close(errors.cpu()[same], wanted_errors[same], rtol=1e-3, atol=1e-3)
