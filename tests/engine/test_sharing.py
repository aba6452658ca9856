"""Concurrent calls do not affect each other; memory stays bounded, and errors about short memory have numbers."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit.engine import workspace
from lowbit.engine.sampling import Sampling
from lowbit.engine.workspace import IDLE, RUNNERS
from lowbit.errors import EngineError
from tests.engine.make import tiny

PROMPTS = [[5, 77, 200, 31], [9], list(range(100, 120)), [3, 1, 4, 1, 5]]
SETTINGS = [
    Sampling(max_new_tokens=12, ignore_eos=True),
    Sampling(max_new_tokens=9, temperature=1.2, top_k=40, seed=4, ignore_eos=True),
    Sampling(max_new_tokens=11, repetition_penalty=1.4, logprobs=2, ignore_eos=True),
    Sampling(max_new_tokens=10, beams=3, ignore_eos=True),
    Sampling(max_new_tokens=14, lookup=3, ignore_eos=True),
]


@pytest.fixture
def model(tmp_path):
    return tiny(tmp_path)[0]


def alone(model) -> dict[tuple[int, int], str]:
    """The text of each prompt with each of SETTINGS."""
    return {
        (p, s): model.generate([prompt], sampling)[0].text
        for p, prompt in enumerate(PROMPTS)
        for s, sampling in enumerate(SETTINGS)
    }


def test_open_streams_write_what_each_writes_alone(model):
    expected = alone(model)
    for setting in range(len(SETTINGS)):
        streams = {p: model.stream([PROMPTS[p]], SETTINGS[setting]) for p in range(len(PROMPTS))}
        texts = dict.fromkeys(streams, "")
        while streams:
            for p, stream in list(streams.items()):
                piece = next(stream, None)
                if piece is None:
                    del streams[p]
                else:
                    texts[p] += piece.text
        assert texts == {p: expected[p, setting] for p in texts}


def test_a_call_amid_an_open_stream_disturbs_neither(model):
    expected = alone(model)
    stream = model.stream([PROMPTS[0]], SETTINGS[0])
    text = next(stream).text
    assert model.generate([PROMPTS[2]], SETTINGS[0])[0].text == expected[2, 0]
    assert model.logits([PROMPTS[3]]).shape == (1, 5, 260)
    text += next(stream).text
    assert model.generate(PROMPTS[:2], SETTINGS[1])[1].text == expected[1, 1]
    assert text + "".join(piece.text for piece in stream) == expected[0, 0]


def test_threads_write_what_each_writes_alone(model):
    expected = alone(model)
    work = list(expected) * 3
    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(lambda at: model.generate([PROMPTS[at[0]]], SETTINGS[at[1]])[0].text, work))
    assert texts == [expected[at] for at in work]


def test_dropped_streams_give_their_place_back(model):
    for _ in range(3 * IDLE):
        next(model.stream([PROMPTS[0]], SETTINGS[0]))
    assert len(model.spaces.idle) == 1
    streams = [model.stream([PROMPTS[0]], SETTINGS[0]) for _ in range(2 * IDLE)]
    assert len({next(stream).text for stream in streams}) == 1
    streams.clear()
    gc.collect()
    assert len(model.spaces.idle) == IDLE


def test_runners_are_bounded_and_the_last_used_stay(model):
    cases = [Sampling(max_new_tokens=2, bad_words=tuple((n,) for n in range(count))) for count in (1, 2, 4, 8, 16)]
    for rows in range(8, 0, -1):
        for sampling in cases:
            model.generate([PROMPTS[0]] * rows, sampling)
    runners = model.spaces.idle[0].runners
    assert len(runners) == RUNNERS
    last = next(reversed(runners.values()))
    model.generate([PROMPTS[0]], cases[-1])
    assert next(reversed(runners.values())) is last


def test_log_probabilities_of_any_number_share_a_runner(model):
    counts = [model.generate([PROMPTS[0]], max_new_tokens=2, logprobs=n)[0].logprobs for n in (0, 1, 7, 100)]
    assert [len(each[0].top) for each in counts] == [0, 1, 7, 100]
    assert len({each[0].logprob for each in counts}) == 1
    chosen = [kind for kind, _ in model.spaces.idle[0].runners if kind.features]
    assert len(chosen) == 1
    assert len(model.spaces.idle[0].runners) == 2  # and the one that computes the logits for it


class Short:
    """A device with memory for the activations of `rows` rows."""

    said = "CUDA out of memory. Tried to allocate 2.50 GiB. 79.1 GiB in all, of which 1.20 GiB is free."

    def __init__(self, model, monkeypatch, rows: int) -> None:
        self.rows, self.layers, self.seen = rows, model.decoder.layers, []
        monkeypatch.setattr(model.decoder, "layers", self)

    def __call__(self, step, cache):
        if len(step.tokens) > self.rows:
            raise torch.OutOfMemoryError(self.said)
        self.seen.append(len(step.tokens))
        return self.layers(step, cache)


def test_a_prompt_goes_in_pieces_that_fit(model, monkeypatch):
    monkeypatch.setattr("lowbit.engine.prefill.LEAST", 4)
    prompt = list(range(3, 43))
    expected = model.generate([prompt], SETTINGS[0])[0].text
    short = Short(model, monkeypatch, rows=12)
    assert model.generate([prompt], SETTINGS[0])[0].text == expected
    assert short.seen[:4] == [10, 10, 10, 10]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(model, monkeypatch, settings):
    expected = model.generate([PROMPTS[0]], settings)[0].text
    with monkeypatch.context() as patch:
        Short(model, patch, rows=5)
        with pytest.raises(EngineError, match=r"40 of its tokens after 0: 2.50 GiB more were asked for, 1.20 GiB are"):
            model.generate([list(range(3, 43))], settings)
        with pytest.raises(EngineError, match="shorten the prompts"):
            model.logits([list(range(3, 43))])
    assert model.generate([PROMPTS[0]], settings)[0].text == expected


def test_idle_workspaces_make_room_before_a_cache_is_refused(model, monkeypatch):
    model.generate([PROMPTS[0]], SETTINGS[0])
    pool = model.spaces
    monkeypatch.setattr(workspace, "on_gpu", lambda device: True)
    monkeypatch.setattr(workspace, "free_nbytes", lambda device: ((10 if pool.idle else 1000) << 10, 2000 << 10))
    cache = pool.make_cache(2, 128)
    assert cache.batch == 2
    assert not pool.idle
    with pytest.raises(
        EngineError, match=r"200 sequences of 128 positions need .* GiB for keys and values, the GPU has"
    ):
        pool.make_cache(200, 128)
