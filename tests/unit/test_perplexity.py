"""evaluation/: the number transformers itself computes, the protocol beside it, and what cannot be compared."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from evaluation.perplexity import difference, perplexity
from evaluation.sample import continuation, load_dense
from export.errors import CheckpointError
from models.source import open_source
from tests.builders import FAMILIES, VOCABULARY, calibration, logits_of, make_model, make_tokenizer, save
from tests.e2e.cli import run_quantize, run_quantize_eval

TEXT = "The quick brown fox jumps over the lazy dog; " * 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, tuple[torch.nn.Module, Path]] = {}

    def model_of(family: str) -> tuple[torch.nn.Module, Path]:
        if family not in made:
            model = make_model(family)
            made[family] = model, save(model, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return model_of


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "opt", "gpt2"])
def test_it_is_transformers_own_loss(models, family):
    model, directory = models(family)
    ids = torch.tensor(make_tokenizer()(TEXT).input_ids)
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in windows]
    score = perplexity(open_source(str(directory)), TEXT, context=64)
    assert len(score.window_nll) == len(losses) > 10
    assert score.window_nll.tolist() == pytest.approx(losses, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert score.tokens == len(losses) * 63


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_through_blocks_gives_the_models_logits(models, family):
    """Block by block from the files, all at once from the files, and transformers' own memory: the same logits.

    To float32 rounding: experts run one by one here, in a batch there, and two threads add in another order than one.
    """
    model, directory = models(family)
    ids = calibration(3, 20).ids
    ours = logits_of(load_dense(open_source(str(directory))), ids)
    torch.testing.assert_close(ours, logits_of(model, ids), rtol=1e-5, atol=1e-6)


def test_only_the_windows_asked_for(models):
    source = open_source(str(models("llama")[1]))
    every, some = perplexity(source, TEXT, 64), perplexity(source, TEXT, 64, windows=3)
    torch.testing.assert_close(every.window_nll[:3], some.window_nll, rtol=1e-6, atol=0)
    assert len(perplexity(source, TEXT, 64, windows=1000).window_nll) == len(every.window_nll)


def test_a_model_differs_from_itself_by_nothing(models):
    score = perplexity(open_source(str(models("llama")[1])), TEXT, 64)
    assert difference(score, score) == (0, 0)


def test_the_difference_is_paired(models):
    score = perplexity(open_source(str(models("llama")[1])), TEXT, 64)
    other = dataclasses.replace(score, window_nll=score.window_nll + 0.5)
    delta, error = difference(other, score)
    assert delta == pytest.approx(0.5)
    assert error == pytest.approx(0, abs=1e-6)
    one = dataclasses.replace(score, window_nll=score.window_nll[:1])
    assert difference(one, one) == (0, None)


def test_a_text_shorter_than_a_window(models):
    with pytest.raises(CheckpointError, match=r"the text has 3 tokens, shorter than one window of 64.*--context"):
        perplexity(open_source(str(models("llama")[1])), "abc", 64)


def test_a_sample_is_what_transformers_writes(models):
    model, directory = models("llama")
    inputs = make_tokenizer()("The capital", return_tensors="pt")
    ids = model.generate(input_ids=inputs.input_ids, do_sample=False, max_new_tokens=6, pad_token_id=258)
    text = make_tokenizer().decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert continuation(open_source(str(directory)), "The capital", 6) == " ".join(text.split())


def test_the_command_prints_one_json_line(models, tmp_path):
    directory = models("llama")[1]
    (tmp_path / "text.txt").write_text(TEXT)
    assert run_quantize(directory, "--method", "int8", "--eval-windows", 0, "-o", tmp_path / "q").code == 0
    args = ["--baseline", directory, "--text", tmp_path / "text.txt", "--context", 64]
    done = run_quantize_eval("perplexity", tmp_path / "q", *args)
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[-1])
    ours = perplexity(open_source(str(tmp_path / "q")), TEXT, 64)
    assert row["perplexity"] == round(ours.perplexity, 4)
    assert row["nll"] == round(ours.nll, 6)
    assert (row["context"], row["windows"], row["tokens"]) == (64, len(ours.window_nll), ours.tokens)
    assert row["text"] == str(tmp_path / "text.txt")
    assert "non-overlapping" in row["protocol"]
    assert row["baseline"]["model"] == str(directory)
    assert row["delta_nll"] == pytest.approx(row["nll"] - row["baseline"]["nll"], abs=2e-6)
    assert not done.err


def test_the_builtin_text_is_the_default(models):
    done = run_quantize_eval("perplexity", models("llama")[1], "--windows", 2, "--context", 32)
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[-1])
    assert (row["text"], row["windows"]) == ("builtin", 2)


def test_the_sample_command_writes_a_line_for_each(models):
    directory = models("llama")[1]
    done = run_quantize_eval("sample", directory, "--baseline", directory, "--prompt", "abc", "--tokens", 4)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith(f"{directory}: abc|")]
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_a_baseline_of_another_vocabulary_is_refused(models, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    other = save(make_model("llama", vocab_size=VOCABULARY), tmp_path / "other")
    backend = Tokenizer(WordLevel({"<unk>": 0, "The": 1, "fox": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(other)
    (tmp_path / "text.txt").write_text(TEXT * 5)
    args = ["--baseline", other, "--text", tmp_path / "text.txt", "--context", 64]
    complaint = run_quantize_eval("perplexity", models("llama")[1], *args).complaint
    assert "cut the text into different tokens" in complaint


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "gone.txt"], "--text gone.txt"),
        (["--context", 100_000, "--text", "README.md"], "shorter than one window"),
        (["--device", "abacus"], "write cpu, cuda"),
        (["--baseline", "./gone"], "is no directory here"),
    ],
)
def test_mistakes(models, args, message):
    assert message in run_quantize_eval("perplexity", models("llama")[1], "--context", 64, *args).complaint
