"""Short prompts in padded passes: rows equal those without padding, at any place and after any earlier prompt."""

from dataclasses import replace

import pytest
import torch

from lowbit import engine
from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.passes import LENGTHS, Reader
from lowbit.engine.prefill import read_prompt
from tests.builders import make_model, save
from tests.engine.make import tiny
from tests.engine.test_families import built

GEMMA4 = ["gemma4_text", "gemma4_text-inputs"]  # experts; inputs of layers, and shared keys and values
PROMPT = list(range(3, 24))


def reader_of(model: Engine, context: int = 64) -> Reader:
    """A reader that also pads on the CPU, over a cache for two sequences."""
    reader = Reader(model.decoder, model.spaces.make_cache(2, context))
    assert reader.lengths == ()
    reader.lengths = LENGTHS
    return reader


def alone(model: Engine, tokens: list[int]) -> torch.Tensor:
    """The prompt's hidden states without padding."""
    cache = model.spaces.make_cache(1, len(tokens))
    return torch.cat(list(read_prompt(model.decoder, cache, 0, tokens)))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox"])
def test_a_padded_pass_computes_the_prompt(family, tmp_path):
    model, _ = tiny(tmp_path, family, **({"sliding_window": 8} if family in ("mistral", "gemma2") else {}))
    reader = reader_of(model)
    with torch.inference_mode():
        for sequence, tokens in ((1, PROMPT), (0, PROMPT[:17]), (1, PROMPT[5:]), (0, [7])):
            [hidden] = reader.read(sequence, tokens)
            torch.testing.assert_close(hidden, alone(model, tokens), atol=2e-5, rtol=1e-4)
    assert sorted(reader.passes) == [8, 16, 32]


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "gpt2", "phi3", "deepseek_v2", "gpt_oss", *GEMMA4])
def test_prompts_that_share_a_pass_are_computed_as_alone(case, tmp_path):
    save(built(case), tmp_path)
    model = engine.load(tmp_path, device="cpu", context=64)
    reader = Reader(model.decoder, model.spaces.make_cache(3, 64))
    reader.lengths = LENGTHS
    given = [(2, PROMPT), (0, PROMPT[5:]), (1, [7])]
    with torch.inference_mode():
        for some in (given[:2], given, given[1:]):
            for hidden, (_, tokens) in zip(reader.read_together(some), some, strict=True):
                torch.testing.assert_close(hidden, alone(model, tokens)[-1:], atol=2e-5, rtol=1e-4)
    assert sorted(reader.shared) == [(64, 2), (64, 4)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "deepseek_v2", "gpt_oss", *GEMMA4])
@pytest.mark.parametrize("lengths", [LENGTHS, ()])
def test_the_last_row_alone_is_the_last_of_all(family, lengths, tmp_path):
    """In the last layer, too, a family with parallel layers or experts computes that row as among all. The cache has
    the keys and values of every row."""
    save(built(family), tmp_path)
    model = engine.load(tmp_path, device="cpu", context=64)
    caches = [model.spaces.make_cache(2, 64) for _ in range(2)]
    with torch.inference_mode():
        whole, ends = (Reader(model.decoder, cache) for cache in caches)
        whole.lengths = ends.lengths = lengths
        for sequence, tokens in ((1, PROMPT), (0, PROMPT[:17]), (1, [7])):
            [end] = ends.read(sequence, tokens, end=True)
            [rows] = whole.read(sequence, tokens)
            assert end.shape == (1, rows.shape[1])
            torch.testing.assert_close(end, rows[-1:], atol=2e-5, rtol=1e-4)
    for layer, same in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(layer.k, same.k)
        assert torch.equal(layer.v, same.v)


@pytest.mark.parametrize("chunk", [1, 5, 20, 21, 64])
def test_the_last_row_of_the_last_chunk(chunk, tmp_path):
    model, _ = tiny(tmp_path)
    cache = model.spaces.make_cache(1, len(PROMPT))
    with torch.inference_mode():
        *before, end = read_prompt(model.decoder, cache, 0, PROMPT, chunk, end=True)
        assert [len(rows) for rows in before] == [chunk] * ((len(PROMPT) - 1) // chunk)
        torch.testing.assert_close(end, alone(model, PROMPT)[-1:], atol=2e-5, rtol=1e-4)


def test_where_features_have_the_last_layers_outputs_all_rows_are_computed(tmp_path):
    model, _ = tiny(tmp_path)
    decoder = model.decoder
    tapped = Decoder(decoder.architecture, decoder.weights, decoder.context, [len(decoder.blocks) - 1])
    wanted = alone(model, PROMPT)
    features = torch.zeros(64, wanted.shape[1], dtype=wanted.dtype)
    for lengths in (LENGTHS, ()):
        reader = Reader(tapped, replace(model.spaces.make_cache(1, 64), features=features.zero_()))
        reader.lengths = lengths
        with torch.inference_mode():
            *_, end = reader.read(0, PROMPT, end=True)
        torch.testing.assert_close(end[-1:], wanted[-1:], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(features[: len(PROMPT)], wanted, atol=2e-5, rtol=1e-4)


def test_the_cache_then_serves_steps(tmp_path):
    model, _ = tiny(tmp_path)
    wanted = [each.tokens for each in model.generate([PROMPT, [5, 6]], max_new_tokens=12, ignore_eos=True)]
    space = model.spaces.idle[0]
    space.roomy_reader(2, 64).lengths = LENGTHS
    got = model.generate([PROMPT, [5, 6]], max_new_tokens=12, ignore_eos=True, logprobs=1, prompt_logprobs=True)
    assert [each.tokens for each in got] == wanted
    assert space.reader is not None
    assert sorted(space.reader.passes) == [8, 32]
    assert [len(each.prompt_logprobs or ()) for each in got] == [len(PROMPT) - 1, 1]


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_a_quantized_cache_is_read_back_as_without_padding(tmp_path, cache):
    save(make_model("llama", head_dim=64), tmp_path)
    model = engine.load(tmp_path, device="cpu", context=64, cache=cache)
    with torch.inference_mode():
        [hidden] = reader_of(model).read(1, PROMPT)
        torch.testing.assert_close(hidden, alone(model, PROMPT), atol=2e-5, rtol=1e-4)


def test_a_prompt_whose_padding_the_cache_has_no_room_for_goes_without(tmp_path):
    model, _ = tiny(tmp_path)
    reader = reader_of(model, context=30)
    with torch.inference_mode():
        [hidden] = reader.read(1, PROMPT)
        assert not reader.passes
        torch.testing.assert_close(hidden, alone(model, PROMPT))


def test_a_pass_that_does_not_fit_goes_in_pieces(tmp_path, monkeypatch):
    model, _ = tiny(tmp_path)
    reader, hidden = reader_of(model), model.decoder.hidden

    def short_of_memory(step, cache):
        if isinstance(step.prefix, torch.Tensor):
            raise torch.OutOfMemoryError
        return hidden(step, cache)

    monkeypatch.setattr(model.decoder, "hidden", short_of_memory)
    with torch.inference_mode():
        assert torch.equal(torch.cat(list(reader.read(1, PROMPT))), alone(model, PROMPT))
        for hidden in reader.read_together([(0, PROMPT), (1, PROMPT)]):
            torch.testing.assert_close(hidden, alone(model, PROMPT)[-1:], atol=2e-5, rtol=1e-4)
