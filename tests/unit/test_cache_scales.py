"""calibrate/cache.py: the keys' scale is the one of those between two powers of two that changes attention least."""

import math

import pytest
import torch

from lowbit.calibrate.cache import STEPS, key_errors
from lowbit.quant.numbers import FP8
from lowbit.quant.numerics import fake_quantize_inputs

B, HEADS, KV_HEADS, T, D = 2, 4, 2, 48, 16


def states(seed, outlier=17.0):
    """Queries and keys; one channel of keys is large and nearly constant."""
    torch.manual_seed(seed)
    query, key = torch.randn(B, HEADS, T, D), torch.randn(B, KV_HEADS, T, D)
    key[..., 3] = outlier + 0.3 * torch.randn(B, KV_HEADS, T)
    return query, key


def divergence(query, key, scale):
    """Of attention with rounded keys from attention with exact ones, (KV_HEADS,)."""
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    exact, rounded = (
        (query @ each.repeat_interleave(HEADS // KV_HEADS, 1).mT / math.sqrt(D))
        .masked_fill(hidden, -math.inf)
        .log_softmax(-1)
        for each in (key, fake_quantize_inputs(key, FP8, scale))
    )
    lost = torch.where(hidden, 0.0, exact.exp() * (exact - rounded))
    return lost.sum((-1, -2, 0)).view(KV_HEADS, -1).sum(1)


def test_errors_are_the_divergence_of_attention():
    query, key = states(0)
    scale = key.abs().amax((0, 2, 3)).view(-1, 1, 1) / 224
    found = key_errors(query, key, scale, "fp8-head")
    wanted = torch.stack([divergence(query, key, scale * 2 ** (step / STEPS)) for step in range(STEPS)])
    torch.testing.assert_close(found, wanted, rtol=0.2, atol=0.0)
    one = key_errors(query, key, scale.amax().view(1), "fp8")
    assert one.shape == (STEPS, 1)


@pytest.mark.parametrize("outlier", [9.0, 17.0])
def test_the_best_scale_is_better_on_other_keys(outlier):
    query, key = states(1, outlier)
    scale = key.abs().amax().view(1) / 224
    best = scale * 2 ** (key_errors(query, key, scale, "fp8").argmin() / STEPS)
    others = [states(seed, outlier) for seed in range(2, 6)]
    chosen, plain = (sum(float(divergence(*each, one).sum()) for each in others) for one in (best, scale))
    assert chosen < 0.8 * plain


def test_nothing_is_lost_with_keys_of_zeros():
    query, key = states(2)
    errors = key_errors(query, torch.zeros_like(key), torch.ones(1), "fp8")
    assert not errors.any()
