"""quant/algos/clip.py: its loss is the linear's output error, and no choice is worse than keeping the whole range."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.algos.clip import SHRINKS, group_losses, group_moments, search_shrink
from lowbit.quant.numerics import fake_quantize
from lowbit.quant.scheme import make_scheme

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
