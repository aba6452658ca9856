"""evaluation/report/card.py: a card that the hub accepts, with current numbers, for any original card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

import lowbit
from lowbit.api.recording import store
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.evaluation.record import FILE
from lowbit.evaluation.report.card import Original, name_card, original_of
from lowbit.evaluation.report.facts import facts_of
from lowbit.export.checkpoint import sha256_of
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.readers import readers_of
from lowbit.export.plain import read_rows
from lowbit.models.demo import BASE_MODEL
from lowbit.models.source import Source, open_source
from lowbit.quant.scheme import parse_scheme
from tests.builders import save_family
from tests.e2e.cli import run_lowbit

CARD = "---\nlicense: llama3.2\nlanguage:\n- en\ntags: [old]\nbase_model: org/base\n---\n# Original\n"
SHAPES = {"model.layers.0.mlp.up_proj": (128, 128), "model.layers.0.mlp.down_proj": (128, 128)}
ROW = {
    "evaluation": "perplexity",
    "model": "made",
    "text": "wiki.txt",
    "perplexity": 13.0,
    "nll": 2.56495,
    "tokens": 250_000,
    "windows": 500,
    "context": 512,
    "protocol": "gptq",
    "backend": "blocks",
    "delta_nll": 0.05,
    "delta_nll_se": 0.001,
    "baseline": {"perplexity": 12.3},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_family("llama", tmp_path_factory.mktemp("original") / "tiny")
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.fixture(scope="module")
def measured(original: Path) -> Path:
    """A checkpoint whose loss was measured, with a base model that the user named."""
    output = original.parent / "made"
    lowbit.quantize(
        original, output, method="rtn", group_size=32, eval_windows=1, measures=["kl"], base_model="org/tiny"
    )
    return output


@pytest.fixture
def made(measured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(measured, tmp_path / "made")


def source_with(directory: Path, tmp_path: Path, card: str | bytes | None) -> Source:
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "README.md").unlink()
    if card is not None:
        (copy / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    return open_source(str(copy))


def test_the_front_matter_is_what_the_hub_reads(measured):
    card = ModelCard.load(measured / "README.md")
    data = card.data
    assert (data.license, data.language, data.library_name) == ("llama3.2", ["en"], "transformers")
    assert (data.base_model, data["base_model_relation"]) == ("org/tiny", "quantized")
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["quantized", "w4a16", "compressed-tensors", "vllm", "sglang", "lowbit", "rtn"]
    assert data.model_name == "made"
    [perplexity, divergence] = data.eval_results
    row = json.loads((measured / "evaluation.jsonl").read_text())
    assert (perplexity.metric_type, perplexity.metric_value) == ("perplexity", row["perplexity"])
    assert (divergence.metric_type, divergence.metric_value) == ("kl_divergence", row["kl_mean"])
    assert perplexity.dataset_name == row["text"]


def test_the_body_says_loss_sizes_use_and_how_to_make_it(measured):
    text = (measured / "README.md").read_text()
    assert "[org/tiny](https://huggingface.co/org/tiny) quantized with lowbit" in text
    row = json.loads((measured / "evaluation.jsonl").read_text())
    assert f"**{row['delta_nll']:+.4f} nats a token** on {row['tokens']} tokens of" in text
    assert f"{row['baseline']['perplexity']:.4f} | {row['perplexity']:.4f}" in text
    assert "KL divergence" in text
    for line in ("vllm serve made", "--model-path made", 'from_pretrained("made"', 'lowbit.load("made")'):
        assert line in text
    assert "quantize tiny --recipe recipe.toml --output DIR" in text
    assert "| weights | " in text


@pytest.mark.peer
def test_the_programs_in_the_card_run(measured, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(measured.parent)
    programs = re.findall(r"```python\n(.*?)```", (measured / "README.md").read_text(), re.S)
    assert len(programs) == 2
    for program in programs:
        exec(program, {})
        assert capsys.readouterr().out.strip()


def test_a_directory_is_called_by_its_name_alone(measured):
    """A published card must not show the model's local path."""
    assert str(measured.parent) not in (measured / "README.md").read_text()


def test_where_a_base_model_is_known_from(original, tmp_path, demo_model):
    assert original_of(open_source(str(original)), "org/tiny").is_base
    inherited = original_of(open_source(str(original)))
    assert (inherited.name, inherited.base_model, inherited.is_base) == ("tiny", "org/base", False)
    bare = original_of(source_with(original, tmp_path, None))
    assert (bare.base_model, bare.carried) == (None, {})
    demo = original_of(open_source("demo"))
    assert (demo.base_model, demo.is_base) == (BASE_MODEL, True)
    assert demo.carried == {"license": "apache-2.0", "language": "en"}


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no front matter",
        "---\n: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: {{ 7 * 7 }}\n---\n",
        b"\xff\xfe\x00",
    ],
    ids=["empty", "none", "broken", "list", "template", "no text"],
)
def test_a_strange_card_of_the_original_does_not_stop_a_run(original, tmp_path, card):
    found = original_of(source_with(original, tmp_path, card))
    assert found == Original("copy", carried=found.carried)
    assert "49" not in str(found.carried)


def test_what_is_recorded_later_leads_the_card_where_it_says_more(made):
    before = (made / "README.md").read_text()
    (made / "README.md").write_text(before + "\nA line of the user's.\n")
    store(made, [ROW])
    text = (made / "README.md").read_text()
    assert "**+0.0500 nats a token** on 250000 tokens of wiki.txt: perplexity 12.3000 before, 13.0000 after." in text
    assert text.endswith("A line of the user's.\n")
    assert "wiki.txt" in (made / "report.html").read_text()
    values = [each.metric_value for each in ModelCard.load(made / "README.md").data.eval_results]
    assert 13.0 in values
    assert metadata_load(made / "README.md")["license"] == "llama3.2"
    sums = (made / "SHA256SUMS").read_text()
    for name in ("README.md", "report.html", "evaluation.jsonl"):
        assert f"{sha256_of(made / name)}  {name}" in sums


def test_a_text_of_the_calibrations_family_leads_only_alone(made):
    recipe = made / "recipe.toml"
    recipe.write_text('dataset = "wikitext"\n' + recipe.read_text())
    store(made, [ROW])
    assert "tokens of builtin held-out: perplexity" in (made / "README.md").read_text()


def test_a_benchmark_and_a_report_renew_the_card(made):
    sizes = ("--batch", 1, "--prompt-tokens", 4, "--new-tokens", 2)
    done = run_lowbit("bench", made, "--record", "--baseline", made, *sizes)
    assert done.code == 0, done.err
    [row] = [row for row in read_rows(made / FILE) if row["evaluation"] == "speed"]
    before, after = row["baseline"]["tokens_per_s"], row["tokens_per_s"]
    line = f"| tokens a second, CPU, batch 1, after 4 | {before:.4g} | {after:.4g} |"
    assert line in (made / "README.md").read_text()
    assert f"<s>{before:.4g}</s> <span>{after:.4g} <small>tokens/s" in (made / "report.html").read_text()
    text = (made / "README.md").read_text()
    (made / "README.md").write_text(text.replace("batch 1", "batch 3"))
    lowbit.report(made)
    assert (made / "README.md").read_text() == text


def test_a_published_card_loads_by_its_repository(made):
    assert name_card(made, "me/made-w4")
    text = (made / "README.md").read_text()
    assert "vllm serve me/made-w4\n" in text
    assert "# made\n" in text
    assert not name_card(made, "me/made-w4")


def test_a_converted_card_is_of_the_new_format(made, tmp_path):
    lowbit.convert(made, tmp_path / "gptq", format="gptq")
    card = ModelCard.load(tmp_path / "gptq" / "README.md")
    assert "gptq" in card.data.tags
    assert "compressed-tensors" not in card.data.tags
    assert "pip install accelerate gptqmodel optimum" in card.text
    assert "Converted from `compressed-tensors` to `gptq`" in card.text
    assert card.data.license == "llama3.2"


def test_a_gguf_is_loaded_by_llama_cpp_and_lowbit(made, tmp_path):
    lowbit.convert(made, tmp_path / "blocks", format="gguf")
    card = ModelCard.load(tmp_path / "blocks" / "README.md")
    assert "llama-cli -m blocks/model.gguf\n" in card.text
    assert 'lowbit.load("blocks")' in card.text
    assert "vllm" not in card.text
    assert card.data.library_name == "gguf"
    assert {"gguf", "llama.cpp"} <= set(card.data.tags)
    assert not {"vllm", "sglang", "compressed-tensors"} & set(card.data.tags)
    assert name_card(tmp_path / "blocks", "me/blocks")
    text = (tmp_path / "blocks" / "README.md").read_text()
    assert "llama-cli --hf-repo me/blocks --hf-file model.gguf\n" in text
    assert all(each["code"] in text for each in facts_of(tmp_path / "blocks", name="me/blocks")["use"])


def test_only_readers_that_load_it_are_named():
    def readers(scheme: str, fmt: str = "compressed-tensors", **more: Any) -> tuple[str, ...]:
        return readers_of(FORMATS[fmt], dict.fromkeys(SHAPES, parse_scheme(scheme)), SHAPES, **more)

    assert readers("int4-g32") == ("vLLM", "SGLang", "transformers", "lowbit")
    assert "SGLang" not in readers("int8-a8-static")
    assert "transformers" not in readers("uint4-g32")
    assert readers("int4-g32", refused=("vLLM", "transformers")) == ("lowbit",)


@pytest.mark.parametrize(
    ("recipe", "refusing"),
    [({"method": "int8"}, ("transformers",)), ({"scheme": "int8-channel-a8token"}, ("transformers", "vLLM"))],
)
def test_a_family_that_others_do_not_read_has_no_command_for_them(tmp_path, recipe, refusing):
    """GPT-2 in vLLM: packed weights are read directly, but a tensor called weight is transposed once more."""
    source = open_source(str(save_family("gpt2", tmp_path)))
    job = prepare(source, complete_recipe({"method": "rtn"} | recipe), "cpu")
    [engines] = [engines for text, engines in job.caveats().items() if "Conv1D" in text]
    assert engines == refusing
    assert job.warnings() == list(job.caveats())
