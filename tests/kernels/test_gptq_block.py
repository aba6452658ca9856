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
    return tuple(tensor[None].to(device) for tensor in tensors)


def several(e: int, n: int, b: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """The blocks of `e` weights, each with a factor of its own."""
    torch.manual_seed(e)
    parts = []
    for one in range(e):
        w, factor, scales, zeros = block(n, b, device)
        parts.append((torch.randn_like(w), factor * (1 + one), scales * torch.rand_like(scales), zeros))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, f, s, z: (w.double(), f, s, z), "w is torch.float64"),
        (lambda w, f, s, z: (w, f[:, :3], s, z), r"factor is torch.float32 \[1, 3, 8\] on cpu; float32 \[1, 8, 8\]"),
        (lambda w, f, s, z: (w, f, s.half(), z), "scales is torch.float16"),
        (lambda w, f, s, z: (w, f, s, z[:, :1]), r"zeros is torch.float32 \[1, 1, 8\]"),
        (lambda w, f, s, z: (w[0], f, s, z), r"a block of columns is \[4, 8\]; at most \[65535, n, 128\] fit"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ops.round_block(*change(*block(4, 8)), INT4)


def test_a_block_too_wide_is_refused():
    with pytest.raises(ValueError, match=r"a block of columns is \[1, 2, 129\]; at most \[65535, n, 128\] fit"):
        ops.round_block(*block(2, 129), INT4)


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0.0, 7.0])
@pytest.mark.parametrize(("n", "b"), [(1, 128), (7, 128), (64, 96), (300, 33), (4096, 128), (5, 1)])
def test_the_kernel_rounds_as_the_loop_does(n, b, zero):
    number = UINT4 if zero else INT4
    codes, errors = ops.round_block(*block(n, b, "cuda", zero), number)
    wanted_codes, wanted_errors = ops.round_block(*block(n, b, "cpu", zero), number)
    same = (codes.cpu() == wanted_codes).all(-1)
    # a fused multiply-add may tip a value that lies between two codes; the rest of its row then differs rightly
    assert same.float().mean() > 0.98
    torch.testing.assert_close(errors.cpu()[same], wanted_errors[same], rtol=1e-3, atol=1e-3)


def test_several_weights_are_rounded_as_one_by_one():
    calls = several(5, 12, 40)
    found = ops.round_block(*calls, INT4)
    for one in range(5):
        alone = ops.round_block(*(each[one : one + 1] for each in calls), INT4)
        assert all(torch.equal(whole[one], part[0]) for whole, part in zip(found, alone, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("e", "n", "b"), [(3, 7, 128), (130, 24, 96), (2, 1536, 128)])
def test_the_kernel_rounds_several_weights_as_one_by_one(e, n, b):
    calls = several(e, n, b, "cuda")
    found = ops.round_block(*calls, INT4)
    for one in range(e):
        alone = ops.round_block(*(each[one : one + 1] for each in calls), INT4)
        assert all(torch.equal(whole[one], part[0]) for whole, part in zip(found, alone, strict=True))
