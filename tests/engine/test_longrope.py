"""Longrope: sequences up to the original context use the short factors, longer ones the long factors throughout."""

import pytest
import torch
from transformers import GenerationConfig

from lowbit.errors import EngineError
from tests.builders import logits_of
from tests.engine.make import tiny

ORIGINAL = 24  # positions
FACTORS = {"short_factor": [1.0, 1.5] * 4, "long_factor": [4.0, 2.0] * 4}
ROPE = {"rope_type": "longrope", "rope_theta": 100.0} | FACTORS
SHORT, NEAR, LONG = list(range(5, 9)), list(range(40, 60)), list(range(80, 110))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    changes = {"original_max_position_embeddings": ORIGINAL, "rope_parameters": ROPE}
    return tiny(tmp_path_factory.mktemp("phi3"), "phi3", **changes)


def by_transformers(reference, prompt: list[int], count: int, **settings) -> list[int]:
    ids = torch.tensor([prompt])
    config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=258, eos_token_id=259, **settings)
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 60])
def test_a_prompts_own_length_decides(pair, length):
    model, reference = pair
    ids = torch.arange(3, 3 + length).unsqueeze(0)
    torch.testing.assert_close(model.logits(ids), logits_of(reference, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 20])
def test_a_sequence_that_grows_long_is_read_again(pair, count):
    model, reference = pair
    expected = by_transformers(reference, NEAR, count)
    got = model.generate([NEAR], max_new_tokens=count, ignore_eos=True)[0]
    assert list(got.tokens) == expected
    assert got.finish_reason == "length"


def test_the_sequences_of_a_batch_turn_each_by_its_length(pair):
    model, reference = pair
    prompts = [SHORT, NEAR, LONG]
    expected = [by_transformers(reference, prompt, 30) for prompt in prompts]
    assert [list(each.tokens) for each in model.generate(prompts, max_new_tokens=30, ignore_eos=True)] == expected


def test_penalties_and_drafts_go_on_over_the_turn(pair):
    model, reference = pair
    expected = by_transformers(reference, NEAR, 16, repetition_penalty=1.7)
    got = model.generate([NEAR], max_new_tokens=16, ignore_eos=True, repetition_penalty=1.7)[0]
    assert list(got.tokens) == expected
    counted = model.generate([NEAR], max_new_tokens=16, ignore_eos=True, frequency_penalty=50.0)[0].tokens
    assert len(set(counted)) == 16
    repeated = (SHORT * 5)[:18]
    drafted = model.generate([repeated], max_new_tokens=20, ignore_eos=True, lookup=4)[0]
    assert list(drafted.tokens) == by_transformers(reference, repeated, 20)


def test_draws_do_not_begin_anew_at_the_turn(pair):
    model, _ = pair
    settings = {"max_new_tokens": 10, "ignore_eos": True, "temperature": 100.0, "seed": 5}
    near, far = (model.generate([prompt], **settings)[0].tokens for prompt in (NEAR, LONG))
    assert near[:9] == far[:9]  # so hot that the noise alone decides
    assert near[:5] != near[5:10]


def test_beams_over_the_turn_are_refused_with_the_numbers(pair):
    model, _ = pair
    with pytest.raises(EngineError, match=r"20 tokens and 16 more pass position 24.*at most 5 tokens"):
        model.generate([NEAR], max_new_tokens=16, beams=2)
    assert len(model.generate([NEAR], max_new_tokens=5, beams=2, ignore_eos=True)[0].tokens) == 5
