"""quant/algos/clip.py: its loss is the linear's output error, and no choice is worse than keeping the whole range."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.algos.clip import SHRINKS, group_losses, group_moments, search_shrink
from lowbit.quant.algos.few import round_in_ranges
from lowbit.quant.numerics import fake_quantize
from lowbit.quant.scheme import make_scheme, parse_scheme

SCHEMES = [make_scheme(4, 32, True), make_scheme(4, 32, False), make_scheme(4, -1, True), make_scheme(8, 64, True)]


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def test_moments_are_the_diagonal_blocks():
    moment = torch.arange(64.0 * 64).reshape(64, 64)
    blocks = group_moments(moment, make_scheme(4, 32, True))
    assert torch.equal(blocks, torch.stack([moment[:32, :32], moment[32:, 32:]]))
    assert torch.equal(group_moments(moment, make_scheme(4, -1, True)), moment[None])


def test_the_loss_is_the_output_error_of_each_group():
    x, error = torch.randn(50, 64), torch.randn(3, 64)
    losses = group_losses(error, group_moments(moment_of(x), make_scheme(4, 32, True)))
    for row in range(3):
        for group in range(2):
            part = slice(group * 32, group * 32 + 32)
            wanted = (x[:, part] @ error[row, part]).square().mean()
            torch.testing.assert_close(losses[row, group], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_never_worse_than_no_clipping_under_its_own_loss(scheme):
    w = torch.randn(24, 128)
    w[::5, 7] *= 12
    moments = group_moments(moment_of(torch.randn(400, 128) * torch.linspace(0.1, 3, 128)), scheme)
    shrink = search_shrink(w, scheme, torch.bfloat16, moments)
    assert shrink.shape == (24, scheme.groups(128))
    full = group_losses(fake_quantize(w, scheme, torch.bfloat16) - w, moments)
    kept = group_losses(fake_quantize(w, scheme, torch.bfloat16, shrink) - w, moments)
    assert bool((kept <= full).all())
    if scheme.bits == 4:
        assert kept.sum() < 0.95 * full.sum()


def test_the_choice_is_the_best_of_all_fractions():
    scheme = make_scheme(4, 32, True)
    w = torch.randn(4, 64)
    moments = group_moments(moment_of(torch.randn(200, 64)), scheme)
    losses = torch.stack(
        [group_losses(fake_quantize(w, scheme, torch.float32, shrink) - w, moments) for shrink in SHRINKS]
    )
    chosen = torch.tensor(SHRINKS)[losses.argmin(0)]
    assert torch.equal(search_shrink(w, scheme, torch.float32, moments), chosen)


def test_the_whole_range_is_tried_and_wins_ties():
    assert SHRINKS[0] == 1
    scheme = make_scheme(4, 32, True)
    assert bool((search_shrink(torch.zeros(3, 32), scheme, torch.float32, torch.eye(32)[None]) == 1).all())


def test_rows_do_not_depend_on_the_chunk_they_are_handled_in(monkeypatch):
    scheme = make_scheme(4, 32, False)
    w, moments = torch.randn(17, 64), group_moments(moment_of(torch.randn(99, 64)), scheme)
    whole = search_shrink(w, scheme, torch.float32, moments)
    monkeypatch.setattr(numerics, "CPU_PIECE", 200)
    assert torch.equal(search_shrink(w, scheme, torch.float32, moments), whole)


SEARCHED = ["int4-g32", "uint4-g32", "int3-g32", "uint2-g32", "int8", "mxfp4-a16", "nvfp4-a16", "fp8-block-a16"]


@pytest.mark.parametrize("piece", [1 << 10, 1 << 15, 1 << 18], ids=["a part of a weight", "one", "all"])
@pytest.mark.parametrize("name", [*SEARCHED, "q4_1", "q2_k", "q4_k", "q6_k"])
def test_ranges_of_several_weights_are_those_of_each(monkeypatch, name, piece):
    monkeypatch.setattr("lowbit.quant.numerics.CPU_PIECE", piece)
    torch.manual_seed(0)
    scheme, w = parse_scheme(name), torch.randn(3, 128, 256)
    moments = torch.stack([moment_of(torch.randn(300, 256) * torch.rand(256)) for _ in range(3)])
    divisor = numerics.own_divisor(w.flatten(0, 1), scheme)
    whole = round_in_ranges(w.flatten(0, 1), scheme, torch.bfloat16, group_moments(moments, scheme), divisor)
    for one, found in enumerate(whole.split(3)):
        alone = round_in_ranges(w[one], scheme, torch.bfloat16, group_moments(moments[one], scheme), divisor)
        same = (found.codes.float() == alone.codes.float()).float().mean()
        assert same == 1 if piece < 1 << 18 else same > 0.99  # sums in another order may turn a tie of two ranges
        assert found.zeros is None or found.zeros.shape == alone.zeros.shape
        assert found.checked().shape == (128, 256)
