"""Perplexity: equal to transformers' number, reported with its protocol; comparisons that are refused."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.perplexity import Score, difference, perplexity
from lowbit.evaluation.text import Cut, Protocol, cut
from lowbit.models.source import open_source
from tests.builders import VOCABULARY, make_model, make_tokenizer, save
from tests.e2e.cli import run_quantize, run_quantize_eval

TEXT = "The quick brown fox jumps over the lazy dog; " * 20
IDS = torch.tensor(make_tokenizer()(TEXT).input_ids)


def score_of(directory: Path, protocol: Protocol, backend: str = "transformers") -> Score:
    source = open_source(str(directory))
    return perplexity(open_backend(backend, source, "cpu"), cut(TEXT, source, protocol))


def own_loss(model: torch.nn.Module, ids: torch.Tensor, first: int = 1) -> float:
    """transformers' loss of ids (T,), in nats a token, those before position `first` not counted."""
    labels = ids.clone()
    labels[:first] = -100
    with torch.no_grad():
        return float(model(input_ids=ids[None], labels=labels[None], use_cache=False).loss)


FAMILIES = ["llama", "gemma3", "mixtral", "opt", "gpt2"]
BACKENDS = [(family, backend) for family in FAMILIES for backend in ("transformers", "blocks")]
BACKENDS += [(family, "engine") for family in ("llama", "gemma3", "gpt2")]


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_it_is_transformers_own_loss(models, family, backend):
    model, directory = models(family)
    losses = [own_loss(model, row) for row in IDS[: len(IDS) // 64 * 64].view(-1, 64)]
    score = score_of(directory, Protocol(64), backend)
    assert len(score.window_nll) == len(losses) > 10
    assert score.window_nll.tolist() == pytest.approx(losses, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert score.tokens == len(losses) * 63


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("stride", [1, 40, 63])
def test_a_strided_score_counts_every_token_once(models, family, stride):
    """By the definition: each token after the first, under the first window that reaches it."""
    model, directory = models(family)
    ids = IDS[:200]
    total, reached = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + 64, len(ids))
        total += own_loss(model, ids[begin:end], reached - begin) * (end - reached)
        reached = end
        if end == len(ids):
            break
    source = open_source(str(directory))
    short = make_tokenizer().decode(ids)
    score = perplexity(open_backend("transformers", source, "cpu"), cut(short, source, Protocol(64, stride)))
    assert score.tokens == len(ids) - 1
    assert score.nll == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_only_the_windows_asked_for(models):
    directory = models("llama")[1]
    every, some = score_of(directory, Protocol(64)), score_of(directory, Protocol(64, windows=3))
    torch.testing.assert_close(every.window_nll[:3], some.window_nll, rtol=1e-6, atol=0)
    assert len(score_of(directory, Protocol(64, windows=1000)).window_nll) == len(every.window_nll)


def test_a_model_differs_from_itself_by_nothing(models):
    score = score_of(models("llama")[1], Protocol(64))
    assert difference(score, score) == (0, 0)


def test_the_difference_is_paired(models):
    score = score_of(models("llama")[1], Protocol(64))
    other = dataclasses.replace(score, window_nll=score.window_nll + 0.5)
    delta, error = difference(other, score)
    assert delta == pytest.approx(0.5)
    assert error == pytest.approx(0, abs=1e-6)
    one = dataclasses.replace(score, window_nll=score.window_nll[:1], window_tokens=score.window_tokens[:1])
    assert difference(one, one) == (0, None)


def test_windows_count_by_their_tokens(models):
    score = score_of(models("llama")[1], Protocol(64, windows=2))
    uneven = dataclasses.replace(
        score, window_nll=torch.tensor([1.0, 2.0]).double(), window_tokens=torch.tensor([30, 10])
    )
    assert uneven.nll == pytest.approx(1.25)
    none = dataclasses.replace(uneven, window_nll=torch.zeros(2).double())
    assert difference(uneven, none)[0] == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (Protocol(64), r"the text has 3 tokens, shorter than one window of 64.*--context"),
        (Protocol(4096), r"windows of 4096 tokens, but .* has positions for 1024"),
    ],
)
def test_a_text_that_does_not_fit(models, protocol, message):
    with pytest.raises(UsageError, match=message):
        cut("abc", open_source(str(models("llama")[1])), protocol)


@pytest.mark.parametrize(("context", "stride"), [(1, None), (64, 0), (64, 64)])
def test_a_protocol_that_makes_no_sense(context, stride):
    with pytest.raises(UsageError, match=r"a (context|stride) of"):
        Protocol(context, stride)


def test_the_command_prints_one_json_line(models, tmp_path):
    directory = models("llama")[1]
    (tmp_path / "text.txt").write_text(TEXT)
    assert run_quantize(directory, "--method", "int8", "--eval-windows", 0, "-o", tmp_path / "q").code == 0
    args = ["--baseline", directory, "--text", tmp_path / "text.txt", "--context", 64]
    done = run_quantize_eval("perplexity", tmp_path / "q", *args)
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[-1])
    ours = score_of(tmp_path / "q", Protocol(64))
    assert row["perplexity"] == round(ours.perplexity, 4)
    assert row["nll"] == round(ours.nll, 6)
    assert (row["context"], row["windows"], row["tokens"]) == (64, len(ours.window_nll), ours.tokens)
    assert row["text"] == str(tmp_path / "text.txt")
    assert "non-overlapping" in row["protocol"]
    assert row["baseline"]["model"] == str(directory)
    assert row["delta_nll"] == pytest.approx(row["nll"] - row["baseline"]["nll"], abs=2e-6)
    assert not done.err
    assert row["protocol"] in done.out.splitlines()[0]


def test_the_strided_command_says_so(models, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["--text", tmp_path / "text.txt", "--context", 64, "--protocol", "strided", "--stride", 16]
    row = json.loads(run_quantize_eval("perplexity", models("llama")[1], *args).out.splitlines()[-1])
    assert row["protocol"].startswith("windows 16 tokens apart")
    assert row["tokens"] == len(IDS) - 1


def test_what_it_computed_in_is_said(models):
    args = ["--windows", 1, "--context", 32, "--dtype", "bfloat16"]
    row = json.loads(run_quantize_eval("perplexity", models("llama")[1], *args).out.splitlines()[-1])
    assert row["protocol"] == "non-overlapping windows, bfloat16, first token of a window not scored"


def test_a_loss_beyond_all_numbers_is_infinite_perplexity(models):
    score = score_of(models("llama")[1], Protocol(64, windows=1))
    assert dataclasses.replace(score, window_nll=torch.tensor([800.0]).double()).perplexity == math.inf


def test_the_builtin_text_is_the_default(models):
    done = run_quantize_eval("perplexity", models("llama")[1], "--windows", 2, "--context", 32)
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[-1])
    assert (row["text"], row["windows"]) == ("builtin", 2)


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
    for command in ("perplexity", "divergence"):
        complaint = run_quantize_eval(command, models("llama")[1], *args).complaint
        assert "cut the text into different tokens" in complaint


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "gone.txt"], "cannot read gone.txt: No such file"),
        (["--context", 1000, "--text", ".gitignore"], "shorter than one window"),
        (["--device", "abacus"], "write cpu, cuda"),
        (["--baseline", "./gone"], "no such directory"),
        (["--stride", 8], "--protocol strided"),
        (["--text-column", "text"], "plain text has no column 'text'"),
        (["--bos", "every"], "its tokenizer puts no BOS before a text"),
    ],
)
def test_mistakes(models, args, message):
    done = run_quantize_eval("perplexity", models("llama")[1], "--context", 64, *args)
    assert done.code == 2
    assert message in done.err


@pytest.fixture
def beginning(models, tmp_path) -> Path:
    """The tiny llama with a tokenizer that puts BOS before every text."""
    directory = shutil.copytree(models("llama")[1], tmp_path / "beginning")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("stride", [None, 40, 63])
def test_bos_before_every_window(models, beginning, stride):
    """By the definition: each token of the text once, behind BOS and what the window has before it."""
    model, ids = models("llama")[0], IDS[:190]
    total, reached = 0.0, 0
    for begin in range(0, len(ids), stride or 63):
        end = min(begin + 63, len(ids))
        if stride is None and end < begin + 63:
            break
        total += own_loss(model, torch.cat([torch.tensor([256]), ids[begin:end]]), reached - begin + 1) * (
            end - reached
        )
        reached = end
        if end == len(ids):
            break
    source = open_source(str(beginning))
    text_cut = cut(make_tokenizer().decode(ids), source, Protocol(64, stride, bos=True))
    score = perplexity(open_backend("transformers", source, "cpu"), text_cut)
    assert score.tokens == reached
    assert score.nll == pytest.approx(total / reached, rel=1e-5)
    assert "BOS before every window" in score.protocol


def test_bos_before_the_first_window_alone_is_said(beginning):
    done = run_quantize_eval("perplexity", beginning, "--context", 64, "--windows", 2)
    assert "note: this model's tokenizer puts BOS before each text" in done.out
    assert json.loads(done.out.splitlines()[-1])["protocol"].endswith(", BOS before the first window alone")
    done = run_quantize_eval("perplexity", beginning, "--context", 64, "--windows", 2, "--bos", "every")
    assert "note" not in done.out
    assert "BOS before every window" in json.loads(done.out.splitlines()[-1])["protocol"]


def test_what_a_run_measures_of_a_model_that_begins_with_bos_does_so_too(beginning, tmp_path):
    done = run_quantize(beginning, "--method", "int8", "--eval-windows", 1, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "BOS before every window" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("short.jsonl", lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
        ("short.json", json.dumps),
        ("short.csv", lambda rows: "text\n" + "hi\n" * 399 + '"hi"\n'),
    ],
)
def test_a_tables_text_is_scored_and_not_its_markup(models, tmp_path, name, write):
    (tmp_path / name).write_text(write([{"text": "hi"}] * 400))
    (tmp_path / "plain.txt").write_text("\n\n".join(["hi"] * 400))
    rows = []
    for text in (name, "plain.txt"):
        done = run_quantize_eval("perplexity", models("llama")[1], "--context", 512, "--text", tmp_path / text)
        rows.append(json.loads(done.out.splitlines()[-1]))
    assert rows[0]["text_sha256"] == rows[1]["text_sha256"]
    assert rows[0]["perplexity"] == rows[1]["perplexity"]
    assert (rows[0]["text_rows"], rows[0]["text_rows_skipped"]) == (400, 0)


def test_rows_that_cannot_be_scored_are_counted(models, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 20 + "{\n")
    args = ("--context", 64, "--text", tmp_path / "chats.jsonl")
    done = run_quantize_eval("perplexity", models("llama")[1], *args)
    assert "note: chats.jsonl: 1 of 21 rows read skipped (row 21: not JSON" in done.out
    row = json.loads(done.out.splitlines()[-1])
    assert (row["text_rows"], row["text_rows_skipped"]) == (20, 1)
    text = "\n\n".join(["user: hello"] * 20)
    assert row["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("backend", ["transformers", "blocks", "engine"])
def test_a_token_beyond_the_vocabulary_is_one_line(models, tmp_path, backend):
    directory = shutil.copytree(models("llama")[1], tmp_path / "model")
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 64', '"a": 260'))
    args = ("perplexity", directory, "--backend", backend, "--context", 64)
    assert "token 260 is none of the model's 260" in run_quantize_eval(*args).complaint
    source = open_source(str(directory))
    with pytest.raises(CheckpointError, match="token -1 is none of the model's 260"):
        next(iter(open_backend(backend, source, "cpu").logits([torch.tensor([[1, -1]])])))


@pytest.mark.demo
@pytest.mark.parametrize("backend", ["transformers", "blocks", "engine"])
def test_the_demo_models_perplexity_is_transformers_own(demo_model, backend):
    from transformers import AutoModelForCausalLM

    from lowbit.calibrate.data import builtin_text

    source = open_source(str(demo_model))
    text_cut = cut(builtin_text("heldout"), source, Protocol(128, windows=2))
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    losses = [own_loss(model, ids) for ids in text_cut.windows]
    score = perplexity(open_backend(backend, source, "cpu"), text_cut)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=5e-5)


def test_a_printed_score_has_its_figures_and_no_windows() -> None:
    windows = Cut(Protocol(4, windows=2), (torch.arange(4), torch.arange(4)), (1, 1), "0" * 64)
    score = Score("demo", torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3, 3]), windows)
    assert repr((score,)) == "(Score('demo', perplexity=4.4817, nll=1.50000, tokens=6),)"
