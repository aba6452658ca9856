"""Generation: the same tokens as transformers for shared settings, and the guarantee of each setting."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from transformers import GenerationConfig

from lowbit import engine
from lowbit.engine.drafts.drafting import accepted
from lowbit.engine.engine import Engine
from lowbit.engine.sampling import Sampling
from lowbit.errors import UsageError
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import attend
from tests.builders import logits_of, save
from tests.engine.make import CHEAP_ROWS, tiny
from tests.engine.test_families import built

PROMPTS = [[5, 77, 200, 31], [9], [100, 101, 102, 103, 104, 105, 106]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(pair) -> Engine:
    return pair[0]


def by_transformers(reference, prompt: list[int], **settings) -> list[int]:
    config = GenerationConfig(pad_token_id=258, eos_token_id=settings.pop("eos_token_id", 257), **settings)
    ids = torch.tensor([prompt])
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(prompt) :].tolist()


def test_greedy_is_transformers_in_a_ragged_batch_and_alone(pair):
    model, reference = pair
    expected = [by_transformers(reference, prompt, do_sample=False, max_new_tokens=20) for prompt in PROMPTS]
    assert [list(each.tokens) for each in model.generate(PROMPTS, max_new_tokens=20)] == expected
    assert [list(model.generate(prompt, max_new_tokens=20)[0].tokens) for prompt in PROMPTS] == expected


def test_more_prompts_than_a_batch_are_served_in_turn(model):
    alone = [model.generate([prompt], max_new_tokens=3)[0].tokens for prompt in PROMPTS]
    assert [each.tokens for each in model.generate(PROMPTS * 7, max_new_tokens=3)] == alone * 7


def test_a_smaller_batch_uses_the_cache_that_is_there(model):
    alone = [model.generate([prompt], max_new_tokens=5)[0].tokens for prompt in PROMPTS]
    model.generate(PROMPTS * 2, max_new_tokens=5)
    cache = model.spaces.idle[0].cache
    assert [model.generate([prompt], max_new_tokens=5)[0].tokens for prompt in PROMPTS] == alone
    model.generate([PROMPTS[0]], beams=3, max_new_tokens=5)
    assert [space.cache for space in model.spaces.idle] == [cache]


def test_same_seed_same_tokens_whoever_shares_the_batch(model):
    settings = Sampling(temperature=1.5, max_new_tokens=16, seed=3)
    alone = model.generate([PROMPTS[0]], settings)[0]
    others = [Sampling(temperature=0.7, top_k=5, seed=8, max_new_tokens=9), Sampling(max_new_tokens=4)]
    together = model.generate(PROMPTS, [settings, *others])
    assert together[0].tokens == alone.tokens
    assert [len(each.tokens) for each in together] == [16, 9, 4]
    assert together[2].tokens == model.generate([PROMPTS[2]], max_new_tokens=4)[0].tokens
    assert model.generate([PROMPTS[0]], settings, seed=4)[0].tokens != alone.tokens


def test_without_a_seed_one_is_drawn_and_told(model):
    first, second = (model.generate([PROMPTS[0]], temperature=2.0, max_new_tokens=8)[0] for _ in range(2))
    assert first.seed != second.seed
    assert model.generate([PROMPTS[0]], temperature=2.0, max_new_tokens=8, seed=first.seed)[0].tokens == first.tokens


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.4}, {"repetition_penalty": 0.8}, {"min_new_tokens": 9}])
def test_penalties_are_those_of_transformers(pair, settings):
    model, reference = pair
    eos = by_transformers(reference, PROMPTS[0], do_sample=False, max_new_tokens=4)[2]
    wanted = by_transformers(reference, PROMPTS[0], do_sample=False, max_new_tokens=24, eos_token_id=eos, **settings)
    got = model.generate([PROMPTS[0]], max_new_tokens=24, stop_tokens=(eos,), ignore_eos=True, **settings)[0]
    assert list(got.tokens) == wanted


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_presence_and_frequency_penalties_count_the_output(pair, penalty):
    model, reference = pair
    sequence, counts = list(PROMPTS[0]), torch.zeros(260)
    for _ in range(16):
        logits = logits_of(reference, torch.tensor([sequence]))[0, -1]
        token = int((logits - 0.5 * (counts.clamp(max=1) if penalty == "presence_penalty" else counts)).argmax())
        counts[token] += 1
        sequence.append(token)
    got = model.generate([PROMPTS[0]], max_new_tokens=16, ignore_eos=True, **{penalty: 0.5})[0]
    assert list(got.tokens) == sequence[len(PROMPTS[0]) :]


def test_bad_words_are_those_of_transformers(pair):
    model, reference = pair
    free = by_transformers(reference, PROMPTS[0], do_sample=False, max_new_tokens=6)
    words = [[free[0]], free[3:5], [PROMPTS[0][-1], 3]]
    wanted = by_transformers(reference, PROMPTS[0], do_sample=False, max_new_tokens=12, bad_words_ids=words)
    got = model.generate([PROMPTS[0]], max_new_tokens=12, bad_words=tuple(map(tuple, words)))[0]
    assert list(got.tokens) == wanted != free


def test_bad_words_as_text_are_not_written(model):
    free = model.generate(["ab"], max_new_tokens=8, stop_tokens=(), ignore_eos=True)[0]
    letters = [letter for letter in free.text if letter.isascii() and letter.isprintable() and letter != " "]
    kept_out = model.generate(["ab"], max_new_tokens=8, bad_words=(letters[0],), ignore_eos=True)[0]
    assert letters[0] not in kept_out.text


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_beams_are_those_of_transformers(pair, prompt, length_penalty):
    model, reference = pair
    greedy = by_transformers(reference, prompt, do_sample=False, max_new_tokens=8)
    settings = {"num_beams": 4, "do_sample": False, "max_new_tokens": 12, "length_penalty": length_penalty}
    wanted = by_transformers(reference, prompt, eos_token_id=greedy[5], **settings)
    got = model.generate(
        [prompt], beams=4, max_new_tokens=12, stop_tokens=(greedy[5],), ignore_eos=True, length_penalty=length_penalty
    )[0]
    assert list(got.tokens) == wanted


def test_beams_obey_penalties(pair):
    model, reference = pair
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 10, "repetition_penalty": 1.3}
    wanted = by_transformers(reference, PROMPTS[2], **settings)
    got = model.generate([PROMPTS[2]], beams=3, max_new_tokens=10, repetition_penalty=1.3)[0]
    assert list(got.tokens) == wanted


def test_logprobs_are_the_models_own(pair):
    model, reference = pair
    got = model.generate(
        [PROMPTS[0]], max_new_tokens=5, logprobs=3, prompt_logprobs=True, temperature=1.0, seed=1, ignore_eos=True
    )[0]
    sequence = [*PROMPTS[0], *got.tokens]
    expected = logits_of(reference, torch.tensor([sequence]))[0].log_softmax(-1)
    entries = [*got.prompt_logprobs, *got.logprobs]
    assert [entry.token for entry in entries] == sequence[1:]
    for row, entry in zip(expected, entries, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        best, tokens = row.topk(3)
        assert list(entry.top) == tokens.tolist()
        assert list(entry.top.values()) == pytest.approx(best.tolist(), abs=1e-4)


def test_a_stop_string_ends_the_text_before_it(model):
    free = model.generate(["ab"], max_new_tokens=40, ignore_eos=True)[0]
    assert len(free.text) > 8
    stop = free.text[5:7]
    got = model.generate(["ab"], max_new_tokens=40, ignore_eos=True, stop=("never this", stop))[0]
    assert got.text == free.text[: free.text.find(stop)]
    assert got.finish_reason == "stop"


def test_a_stop_token_is_the_last(model):
    free = model.generate([PROMPTS[0]], max_new_tokens=10, ignore_eos=True)[0].tokens
    got = model.generate([PROMPTS[0]], max_new_tokens=10, ignore_eos=True, stop_tokens=(free[4],))[0]
    assert got.tokens == free[: free.index(free[4]) + 1]
    assert got.finish_reason == "stop"


def test_the_context_ends_a_text(model):
    got = model.generate([[1] * 120], max_new_tokens=50, ignore_eos=True)[0]
    assert (len(got.tokens), got.finish_reason) == (8, "length")


def test_pieces_of_a_stream_make_the_text(model):
    settings = Sampling(max_new_tokens=30, temperature=1.2, seed=2, ignore_eos=True, stop=("Q",))
    whole = model.generate(["hello", "you there"], settings)
    pieces = list(model.stream(["hello", "you there"], settings))
    for index, completion in enumerate(whole):
        mine = [piece for piece in pieces if piece.request == index]
        assert "".join(piece.text for piece in mine) == completion.text
        assert tuple(token for piece in mine for token in piece.tokens) == completion.tokens
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]


def test_a_dropped_stream_leaves_the_engine_usable(model):
    before = model.generate(PROMPTS, max_new_tokens=8)
    stream = model.stream(PROMPTS, max_new_tokens=8, temperature=1.0)
    next(stream)
    stream.close()
    assert [each.tokens for each in model.generate(PROMPTS, max_new_tokens=8)] == [each.tokens for each in before]


@pytest.mark.parametrize("drafts", [1, 4, 7])
def test_lookup_writes_what_greedy_decoding_writes(model, drafts):
    prompt = [7, 8, 9, 10, 11, 12] * 5
    greedy = model.generate([prompt], max_new_tokens=80, ignore_eos=True)[0]
    looked_up = model.generate([prompt], max_new_tokens=80, lookup=drafts, ignore_eos=True)[0]
    assert looked_up.tokens == greedy.tokens
    assert looked_up.steps < greedy.steps


def test_drafts_are_adjacent_rows_of_one_sequence(model):
    calls = []
    with mock.patch.object(ops, "attend", side_effect=lambda call: calls.append(call) or attend(call)):
        model.generate([[7, 8, 9, 10, 11, 12] * 5], max_new_tokens=20, lookup=3, ignore_eos=True)
    rows = {(call.adjacent, len(call.q)) for call in calls}
    assert (4, 4) in rows
    assert all(adjacent == count for adjacent, count in rows)
    for call in calls:
        assert (call.starts == 0).all()
        assert call.positions.tolist() == list(range(int(call.positions[0]), int(call.positions[0]) + len(call.q)))


def test_lookup_fills_the_context_to_its_end(model):
    prompt = [7, 8, 9, 10] * 29
    assert len(model.generate([prompt], lookup=7, ignore_eos=True)[0].tokens) == 128 - len(prompt)


def test_drafts_are_accepted_up_to_the_first_that_differs():
    assert accepted([4, 5, 6], [4, 5, 7, 8]) == [4, 5, 7]
    assert accepted([4, 5], [4, 5, 6]) == [4, 5, 6]
    assert accepted([], [3]) == [3]


def test_no_stop_ends_a_text_before_its_least_tokens(model):
    free = model.generate([PROMPTS[0]], max_new_tokens=20, ignore_eos=True)[0]
    early = next(text for text in (free.text[i] for i in range(3, 8)) if text in free.text[:8] and text != "\ufffd")
    short = model.generate([PROMPTS[0]], max_new_tokens=20, ignore_eos=True, stop=(early,))[0]
    late = model.generate([PROMPTS[0]], max_new_tokens=20, ignore_eos=True, stop=(early,), min_new_tokens=20)[0]
    assert len(short.tokens) < 10
    assert short.finish_reason == "stop"
    assert late.text == free.text
    assert late.finish_reason == "length"


def test_a_bad_word_is_its_tokens_and_no_more(model):
    """One token per byte: "ab" is two tokens, which may still be apart."""
    free = model.generate([PROMPTS[0]], max_new_tokens=12, ignore_eos=True)[0].tokens
    banned = model.generate([PROMPTS[0]], max_new_tokens=12, ignore_eos=True, bad_words=(free[2:4],))[0].tokens
    assert banned[:3] == free[:3]
    assert banned[3] != free[3]
    assert all(pair != free[2:4] for pair in pairwise(banned))


@pytest.mark.parametrize("case", ["gemma4_text", "gemma4_text-inputs"])
def test_caches_of_several_shapes_serve_beams_and_drafts(case, tmp_path):
    """Caches differ in heads and widths, or are those of several layers: beams reorder each once."""
    reference = built(case)
    save(reference, tmp_path)
    model = engine.load(tmp_path, device="cpu", context=128)
    model.spaces.costs = CHEAP_ROWS
    wanted = by_transformers(reference, PROMPTS[0], num_beams=4, do_sample=False, max_new_tokens=12)
    assert list(model.generate([PROMPTS[0]], beams=4, max_new_tokens=12, ignore_eos=True)[0].tokens) == wanted
    prompt = [7, 8, 9, 10, 11, 12] * 5
    greedy, looked_up = (
        model.generate([prompt, PROMPTS[0]], max_new_tokens=40, lookup=count, ignore_eos=True) for count in (0, 4)
    )
    assert [each.tokens for each in looked_up] == [each.tokens for each in greedy]
    int8 = engine.load(tmp_path, device="cpu", context=128, cache="int8")
    whole, rounded = (each.logits([prompt])[0] for each in (model, int8))
    assert 0 < (rounded - whole).abs().mean() < 0.15 * whole.abs().mean()  # a row may choose another expert
    with pytest.raises(UsageError, match=r"cache 'int4': heads of 16: .* or use cache='int8'"):
        engine.load(tmp_path, device="cpu", cache="int4")
