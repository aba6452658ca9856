"""The sampler against transformers' warpers and against the distribution it should draw from."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lowbit.engine.sampler import Constraints, Sampler, features_of
from lowbit.engine.sampling import Sampling
from lowbit.quant.kernels.choose_tokens import Cursor, gumbel

VOCABULARY = 40


def sampler_for(*settings: Sampling, seeds: range | None = None) -> Sampler:
    requests = [
        Constraints(each, seed, [1], ()) for each, seed in zip(settings, seeds or range(len(settings)), strict=True)
    ]
    sampler = Sampler(features_of(requests), len(requests), VOCABULARY, torch.device("cpu"))
    sampler.start(requests)
    return sampler


def test_truncation_keeps_what_transformers_keeps():
    cases = [
        Sampling(temperature=0.7, top_k=7, top_p=0.8, min_p=0.05),
        Sampling(temperature=1.3, top_p=0.5),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=2.0, min_p=0.3),
        Sampling(temperature=1.0),
    ]
    logits = 2 * torch.randn(len(cases), VOCABULARY)
    sampler = sampler_for(*cases)
    scaled = logits / sampler.temperature
    kept = scaled >= sampler.threshold(scaled)
    for row, case in enumerate(cases):
        scores = TemperatureLogitsWarper(case.temperature)(None, logits[row : row + 1])
        scores = TopKLogitsWarper(case.top_k)(None, scores) if case.top_k else scores
        scores = TopPLogitsWarper(case.top_p)(None, scores) if case.top_p < 1 else scores
        scores = MinPLogitsWarper(case.min_p)(None, scores) if case.min_p else scores
        assert torch.equal(kept[row], scores[0] > float("-inf")), case


def test_draws_follow_the_distribution():
    count = 40_000
    logits = torch.randn(VOCABULARY)
    sampler = sampler_for(*[Sampling(temperature=0.8)] * count, seeds=range(count))
    tokens = sampler(logits.repeat(count, 1)).tokens
    expected = (logits / 0.8).softmax(-1) * count
    found = torch.bincount(tokens, minlength=VOCABULARY)
    # chi-square with 39 degrees of freedom: 99.9% of fair draws lie below 73
    assert float(((found - expected) ** 2 / expected).sum()) < 73


def test_draws_are_among_what_truncation_keeps():
    count, logits = 200, torch.randn(VOCABULARY)
    sampler = sampler_for(*[Sampling(temperature=5.0, top_k=3)] * count, seeds=range(count))
    assert set(sampler(logits.repeat(count, 1)).tokens.tolist()) == set(logits.topk(3).indices.tolist())


def test_steps_of_a_request_draw_independently():
    first, second = (gumbel(torch.arange(64).unsqueeze(1), torch.full((64, 1), step), 1000) for step in (0, 1))
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.02  # eight standard errors
    assert first.isfinite().all()


def test_a_cold_row_takes_the_likeliest_beside_warm_ones():
    logits = torch.randn(3, VOCABULARY)
    sampler = sampler_for(Sampling(temperature=5.0), Sampling(), Sampling(temperature=5.0, top_k=3))
    assert sampler(logits).tokens[1] == logits[1].argmax()


class Called(TorchDispatchMode):
    """Names of the operators that were called; views and empty tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in (torch.ops.aten.select.int, torch.ops.aten.empty.memory_format):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_a_plain_step_ends_in_one_launch(temperature):
    sampler, logits = sampler_for(Sampling(), Sampling(temperature=temperature)), torch.randn(2, VOCABULARY)
    logits[1] *= 10  # a far likelier token is drawn
    tokens, positions, slots = torch.zeros(3, 2, dtype=torch.int64)
    with Called() as called:
        chosen = sampler(logits, tokens, Cursor(positions, slots, 9))
    assert called.names == ["lowbit.choose_tokens.default"]
    assert chosen.tokens is tokens
    assert torch.equal(tokens, logits.argmax(-1))
    assert (positions.tolist(), slots.tolist(), sampler.written.tolist()) == ([1, 1], [1, 1], [[1], [1]])


def test_a_bias_is_added_to_the_logit_of_its_token():
    logits = torch.randn(2, VOCABULARY)
    sampler = sampler_for(Sampling(bias=((3, 100.0), (4, -100.0), (4, 1.0))), Sampling(presence_penalty=0.5))
    scores = sampler.penalize(logits)
    changed = logits.clone()
    changed[0, 3] += 100
    changed[0, 4] -= 99
    assert torch.equal(scores, changed)
    assert sampler(logits).tokens.tolist() == [3, int(logits[1].argmax())]
