"""Divergence: its definition, zero against itself, and models that cannot be compared."""

import json
from itertools import pairwise

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.divergence import divergence, require_same_vocabulary
from lowbit.evaluation.text import Protocol, cut
from lowbit.models.source import open_source
from tests.builders import logits_of, make_model, make_tokenizer, save
from tests.e2e.cli import run_quantize_eval

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
IDS = torch.tensor(make_tokenizer()(TEXT).input_ids)


def opened(directory, backend="transformers"):
    return open_backend(backend, open_source(str(directory)), "cpu")


def measured(ours, theirs, protocol):
    return divergence(ours, theirs, cut(TEXT, ours.source, protocol))


@pytest.mark.parametrize("backend", ["transformers", "blocks"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_model_does_not_diverge_from_itself(models, family, backend):
    found = measured(*(opened(models(family)[1], backend) for _ in range(2)), Protocol(64))
    assert float(found.all_kl.max()) == 0
    assert found.mean == 0
    assert found.top1 == 1
    assert found.as_json()["kl_p999"] == 0


@pytest.fixture(scope="module")
def pair(models, tmp_path_factory):
    """A model and another of the same shape, with their directories."""
    model, directory = models("llama")
    other = make_model("llama", seed=1)
    return model, directory, other, save(other, tmp_path_factory.mktemp("other") / "other")


@pytest.mark.parametrize("stride", [None, 40])
def test_it_is_the_definition(pair, stride):
    base, base_directory, ours, our_directory = pair
    found = measured(opened(our_directory), opened(base_directory), Protocol(64, stride))
    assert len(found.all_kl) == found.quantized.tokens
    text_cut = found.quantized.cut
    for window in (0, 1, len(found.kl) - 1):
        ids, first = text_cut.windows[window], text_cut.first[window]
        p, q = (logits_of(model, ids[None])[0, first - 1 : -1].double().log_softmax(-1) for model in (base, ours))
        expected = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(found.kl[window].double(), expected, rtol=1e-4, atol=1e-6)
        assert found.agree[window].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    rows = found.as_json()
    assert rows["kl_mean"] == pytest.approx(float(torch.cat(found.kl).double().mean()), rel=1e-5)
    assert rows["kl_p999"] == pytest.approx(float(torch.quantile(found.all_kl, 0.999)), rel=1e-5)
    assert rows["kl_median"] <= rows["kl_p99"] <= rows["kl_p999"] <= rows["kl_max"]


def test_both_losses_come_with_it(pair):
    from lowbit.evaluation.perplexity import perplexity

    found = measured(opened(pair[3]), opened(pair[1]), Protocol(64))
    for score, directory in ((found.quantized, pair[3]), (found.baseline, pair[1])):
        alone = perplexity(opened(directory), score.cut)
        torch.testing.assert_close(score.window_nll, alone.window_nll, rtol=1e-6, atol=0)


def test_by_position_and_the_worst_tokens(pair):
    found = measured(opened(pair[3]), opened(pair[1]), Protocol(64))
    rows = found.by_position(8)
    assert rows[0]["from"] == 1
    assert rows[-1]["to"] == 63
    assert all(after["from"] == before["to"] + 1 for before, after in pairwise(rows))
    sizes = [row["to"] - row["from"] + 1 for row in rows]
    mean = sum(row["kl"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(found.mean, rel=1e-4)
    worst = found.worst[0]
    assert worst["kl"] == pytest.approx(float(found.all_kl.max()), rel=1e-5)
    ids = found.quantized.cut.windows[worst["window"]]
    assert make_tokenizer().decode(ids[: worst["position"]]).endswith(worst["before"])
    assert make_tokenizer().decode([int(ids[worst["position"]])]) == worst["next"]
    chances = logits_of(pair[0], ids[None])[0, worst["position"] - 1].softmax(-1)
    assert worst["baseline"]["chance"] == pytest.approx(float(chances.max()), rel=1e-4)
    assert [each["kl"] for each in found.worst] == sorted((each["kl"] for each in found.worst), reverse=True)


def test_the_tail_is_what_share_lies_beyond(pair):
    found = measured(opened(pair[3]), opened(pair[1]), Protocol(64))
    for kl, share in found.survival(20):
        assert share == pytest.approx(
            float((found.all_kl >= kl * (1 - 1e-5)).double().mean()), abs=2 / len(found.all_kl)
        )


def test_another_vocabulary_is_refused(models, tmp_path):
    other = save(make_model("llama", vocab_size=300), tmp_path / "wider")
    with pytest.raises(CheckpointError, match=r"a vocabulary of 300 tokens, .* one of 260"):
        require_same_vocabulary(opened(other), opened(models("llama")[1]))
    complaint = run_quantize_eval("divergence", other, "--baseline", models("llama")[1], "--context", 64).complaint
    assert "name the model that the checkpoint was made from" in complaint


def test_the_command(pair, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["--baseline", pair[1], "--text", tmp_path / "text.txt", "--context", 64]
    done = run_quantize_eval("divergence", pair[3], *args)
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[-1])
    found = measured(opened(pair[3]), opened(pair[1]), Protocol(64))
    assert row["kl_mean"] == found.as_json()["kl_mean"]
    assert row["top1_agreement"] == found.as_json()["top1_agreement"]
    assert row["baseline"]["nll"] == round(found.baseline.nll, 6)
    assert f"KL {found.mean:.5f}" in done.out
    assert "name the model to compare with" in run_quantize_eval("divergence", pair[3]).err
