"""Requests that cannot be served are refused before any computation, with numbers; long prompts go in chunks."""

import pytest
import torch

from lowbit.engine.prefill import read_prompt
from lowbit.engine.sampling import Sampling
from lowbit.errors import EngineError
from tests.engine.make import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("mistral"), "mistral")[0]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "the prompt is empty"),
        ([""], {}, "the prompt is empty"),
        ([[1] * 128], {}, r"128 tokens, the engine's context is 128"),
        ([[1, 260]], {}, "token 260 is none of the model's 260"),
        ([[1]], {"temprature": 1.0}, r"temprature.*a Sampling has max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0: it must lie between 0 and 100"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9: it must lie between 0 and 8"),
        ([[1]], {"stop": "end"}, "stop is 'end': a list"),
        ([[1]], {"stop": ("",)}, "strings that are not empty"),
        ([[1]], {"stop": (7,)}, r"stop is \(7,\): Sequence\[str\] is needed"),
        ([[1]], {"stop_tokens": (999,)}, "stop token 999 is none of the model's 260"),
        ([[1]], {"bad_words": ((1,) * 9,)}, "has 9 tokens; at most 8"),
        ([[1]], {"bad_words": ((-4,),)}, "token -4 of a bad word"),
        ([[1]], {"bad_words": (" ",)}, "bad word ' ' is white space, which stands within most tokens"),
        ([[1]], {"bad_words": ("\n\t",)}, "is white space"),
        (["a\udcff"], {}, r"character 1 of 'a\\udcff' is half a surrogate pair"),
        ([[1]], {"bad_words": ("\ud800",)}, r"character 0 of '\\ud800' is half a surrogate pair"),
        ([[1]], {"beams": 2, "temperature": 1.0}, "beam search samples nothing"),
        ([[1]], {"seed": 1 << 70}, "seed is 1180591620717411303424: it must lie between"),
        (
            [[1]],
            {"lookup": 3, "beams": 2},
            "no drafts: leave out lookup, which is 3, or the 2 beams",
        ),
        ([[1]], {"lookup": 8}, "lookup is 8: it must lie between 0 and 7"),
    ],
)
def test_what_cannot_be_served_is_told(model, prompts, settings, message):
    with pytest.raises(EngineError, match=message):
        model.generate(prompts, **settings)
    assert len(model.generate([[1, 2]], max_new_tokens=2, ignore_eos=True)[0].tokens) == 2


def test_one_sampling_a_prompt_or_one_for_all(model):
    with pytest.raises(EngineError, match="2 prompts and 1 samplings"):
        model.generate([[1], [2]], [Sampling()])


def test_logits_need_rows_of_one_length(model):
    with pytest.raises(EngineError, match="2 rows of different lengths"):
        model.logits([[1, 2], [3]])


def test_a_model_without_a_template_has_no_chat_and_a_hostile_one_ends_none(model):
    model.tokenizer.chat_template, kept = None, model.tokenizer.chat_template
    with pytest.raises(EngineError, match="no chat template"):
        model.encode_chat([{"role": "user", "content": "hello"}])
    for hostile, message in (
        ("{{ 'a' * 10000000000 }}", "MiB of memory"),
        ("{{ raise_exception('no') }}", "messages: no"),
    ):
        model.tokenizer.chat_template = hostile
        with pytest.raises(EngineError, match=message):
            model.encode_chat([{"role": "user", "content": "hello"}])
    model.tokenizer.chat_template = kept
    ids = model.encode_chat([{"role": "user", "content": "hello"}])
    assert model.tokenizer.decode(ids) == "user: hello\n"


@pytest.mark.parametrize("chunk", [1, 5, 32])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_prompt_in_chunks_is_the_prompt(family, chunk, tmp_path):
    model, _ = tiny(tmp_path, family, sliding_window=8)
    prompt = list(range(3, 35))
    with torch.inference_mode():
        cache = model.spaces.make_cache(2, len(prompt))
        parts = [model.decoder.logits(h) for h in read_prompt(model.decoder, cache, 1, prompt, chunk=chunk)]
    torch.testing.assert_close(torch.cat(parts), model.logits([prompt])[0], atol=2e-5, rtol=1e-4)


def test_an_interrupt_leaves_the_engine_usable(model, monkeypatch):
    expected = model.generate([[1, 2, 3]], max_new_tokens=6, ignore_eos=True)[0].tokens
    steps = iter(range(3))
    layer = model.decoder.layer

    def interrupted(*args):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return layer(*args)

    monkeypatch.setattr(model.decoder, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate([[1, 2, 3]], max_new_tokens=6)
    monkeypatch.undo()
    assert model.generate([[1, 2, 3]], max_new_tokens=6, ignore_eos=True)[0].tokens == expected
