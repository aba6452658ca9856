"""Backends agree: the same logits from all, and errors for anything that one cannot do."""

import shutil

import pytest
import torch

from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.backend import choose_backend, load_dense, open_backend, until_end
from lowbit.models.source import open_source
from lowbit.models.walk import Walk
from tests.builders import FAMILIES, calibration, logits_of, make_tokenizer, save_family
from tests.e2e.cli import run_quantize, run_quantize_eval

IDS = calibration(3, 20).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_from_the_files_gives_the_models_logits(models, family):
    """Equal up to float32 rounding: experts run one by one or in a batch, and threads change the summation order."""
    model, directory = models(family)
    ours = logits_of(load_dense(open_source(str(directory))), IDS)
    torch.testing.assert_close(ours, logits_of(model, IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_through_blocks_gives_the_models_logits(models, family, monkeypatch):
    model, directory = models(family)
    backend = open_backend("blocks", open_source(str(directory)), "cpu")
    monkeypatch.setattr("lowbit.evaluation.backend.HIDDEN_BYTES", 64 * 4 * 40)  # two batches a walk
    batches = [IDS[:1], IDS[1:2], IDS[2:]]
    found = list(backend.logits(iter(batches)))
    torch.testing.assert_close(torch.cat(found), logits_of(model, IDS), rtol=1e-5, atol=1e-6)


def test_a_walk_takes_as_many_batches_as_their_states_allow(tmp_path, monkeypatch):
    """Gemma 3n has four streams of hidden states, and also an embedding per layer."""
    source = open_source(str(save_family("gemma3n", tmp_path)))
    backend = open_backend("blocks", source, "cpu")
    taken = []
    start = Walk.start_some
    monkeypatch.setattr(Walk, "start_some", lambda *args: taken.append(start(*args)) or taken[-1])
    token = 4 * (4 * 64 + 4 * 16)  # bytes: streams by width, layers by embedding, in float32
    batch = 20 * token
    monkeypatch.setattr("lowbit.evaluation.backend.HIDDEN_BYTES", 3 * batch)
    list(backend.logits([IDS[:1]] * 7))
    assert [len(begun) for begun in taken] == [3, 3, 1, 0]
    assert taken[0][0][1].nbytes == batch


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_the_engine_gives_the_models_logits(models, family):
    model, directory = models(family)
    backend = open_backend("engine", open_source(str(directory)), "cpu")
    torch.testing.assert_close(torch.cat(list(backend.logits([IDS]))), logits_of(model, IDS), rtol=1e-4, atol=1e-5)


def test_packed_weights_are_the_dense_ones_dequantized(int4):
    source = open_source(str(int4))
    dense, packed = (next(open_backend(name, source, "cpu").logits([IDS])) for name in ("transformers", "engine"))
    torch.testing.assert_close(packed, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8-channel-a8token", "int8-channel-a8tensor", "fp8", "fp8-channel-afp8tensor"])
def test_inputs_are_rounded_by_every_backend(models, tmp_path, scheme):
    args = ("--method", "smoothquant", "--scheme", scheme, "--num-samples", 4, "--seqlen", 32)
    done = run_quantize(models("llama")[1], *args, "--eval-windows", 0, "-o", tmp_path / "w8a8")
    assert done.code == 0, done.err
    source = open_source(str(tmp_path / "w8a8"))
    found = {
        name: torch.cat(list(open_backend(name, source, "cpu").logits([IDS])))
        for name in ("transformers", "blocks", "engine")
    }
    weights_alone = logits_of(load_dense(source), IDS)
    rounding = (found["blocks"] - weights_alone).abs().max()
    assert rounding > 1e-4
    for name in ("transformers", "engine"):
        assert (found[name] - found["blocks"]).abs().max() < 0.2 * rounding, name
    prompt = IDS[0].tolist()
    first = open_backend("transformers", source, "cpu").generate(prompt, 1)
    assert first == [int(found["blocks"][0, -1].argmax())]


def test_log_likelihoods_are_the_logits(models):
    model, directory = models("llama")
    [found] = open_backend("transformers", open_source(str(directory)), "cpu").log_likelihoods([IDS])
    expected = logits_of(model, IDS).log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["transformers", "engine"])
def test_it_writes_what_transformers_writes(models, name):
    model, directory = models("llama")
    inputs = make_tokenizer()("The capital", return_tensors="pt")
    ids = model.generate(input_ids=inputs.input_ids, do_sample=False, max_new_tokens=6, pad_token_id=258)
    backend = open_backend(name, open_source(str(directory)), "cpu")
    assert backend.generate(inputs.input_ids[0].tolist(), 6) == ids[0, inputs.input_ids.shape[1] :].tolist()


def test_an_end_token_is_not_written(models):
    assert until_end([1, 2, 257, 4], frozenset({257})) == [1, 2]
    assert open_backend("transformers", open_source(str(models("llama")[1])), "cpu").end_tokens() == {257}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id is '</s>'; a token id"),
        ("[]", "generation_config.json: a JSON object is expected, not list"),
    ],
)
def test_a_generation_config_of_another_shape_is_one_line(models, tmp_path, text, told):
    directory = shutil.copytree(models("llama")[1], tmp_path / "model")
    (directory / "generation_config.json").write_text(text)
    assert told in run_quantize_eval("generate", directory, "--prompt", ">", "--tokens", 1).complaint


def test_what_fits_no_memory_is_read_block_by_block(models, monkeypatch):
    source = open_source(str(models("llama")[1]))
    assert choose_backend(source, "cpu", torch.float32) == "transformers"
    monkeypatch.setattr("lowbit.evaluation.backend.MEMORY_SHARE", 1e-9)
    assert choose_backend(source, "cpu", torch.float32) == "blocks"


def test_what_a_backend_cannot_do(models):
    source = open_source(str(models("llama")[1]))
    with pytest.raises(UsageError, match="did you mean 'transformers'"):
        open_backend("transformer", source, "cpu")
    with pytest.raises(UsageError, match="generate with --backend transformers"):
        open_backend("blocks", source, "cpu").generate([1], 1)
    with pytest.raises(UsageError, match="not whole distributions"):
        open_backend("vllm", source, "cpu").logits([IDS])


@pytest.mark.peer
def test_vllm_missing_is_said(models):
    try:
        import vllm  # noqa: F401
    except ImportError:
        backend = open_backend("vllm", open_source(str(models("llama")[1])), "cpu")
        with pytest.raises(CheckpointError, match="vLLM is not installed here"):
            next(backend.log_likelihoods([IDS]))
    else:
        pytest.skip("vLLM is installed")
