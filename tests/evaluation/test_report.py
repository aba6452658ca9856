"""Reports: every number comes from the files, nothing unmeasured is claimed, and the page is self-contained."""

import json
import re
import subprocess
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from lowbit.errors import CheckpointError
from lowbit.evaluation.generate import PROMPTS
from lowbit.evaluation.record import FILE, merge_rows, record
from lowbit.evaluation.report.compare import comparison
from lowbit.evaluation.report.facts import EVALUATIONS, bytes_by_kind, facts_of, group_of, kind_of
from lowbit.evaluation.report.family import families_of, family_of
from lowbit.evaluation.report.page import environment_of, figures_of, render, render_comparison
from lowbit.evaluation.report.plots import HEAT_STEPS, NARROW, WIDE, heat_step, megabytes, pareto_front, pareto_plot
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.escape import one_line
from lowbit.export.formats import LogicalTensors
from lowbit.export.plain import read_rows
from tests.builders import make_model, save_family
from tests.e2e.cli import run_quantize, run_quantize_eval, run_quantize_report

SPEED: dict[str, Any] = {"device": "a GPU", "ms_per_token": 10.0, "share_of_floor": 0.5}
SPEED |= {"baseline": {"model": "model", "tokens_per_s": 40.0, "ms_per_token": 25.0}}


@pytest.fixture(scope="module")
def awq(models, tmp_path_factory):
    """The tiny llama by awq, with a fallback: 96 inputs do not divide by 64."""
    output = tmp_path_factory.mktemp("awq") / "llama-awq"
    args = ("--method", "awq", "--group-size", 64, "--num-samples", 4, "--seqlen", 32)
    done = run_quantize(models("llama")[1], *args, "--eval-windows", 2, "-o", output)
    assert done.code == 0, done.err
    return output


@pytest.fixture
def copied(awq, tmp_path):
    """A copy of the awq checkpoint to change."""
    import shutil

    return shutil.copytree(awq, tmp_path / "llama-awq")


def test_every_byte_and_parameter_has_a_kind(awq, models):
    kinds = facts_of(awq)["kinds"]
    assert sum(row["after"] for row in kinds) == open_checkpoint(awq).nbytes
    parameters = sum(p.numel() for p in make_model("llama").parameters())
    assert sum(row["parameters"] for row in kinds) == parameters
    gate = next(row for row in kinds if row["kind"] == "mlp.gate_proj")
    assert gate["parameters"] == 2 * 64 * 96
    assert gate["bits"] == pytest.approx(8 * gate["after"] / gate["parameters"], abs=1e-3)
    assert gate["before"] == gate["parameters"] * 4
    plain = bytes_by_kind(LogicalTensors(open_checkpoint(models("llama")[1])), None)
    assert sum(row["parameters"] for row in plain) == parameters


def test_the_facts_are_the_runs_own(awq):
    facts, run = facts_of(awq), json.loads((awq / "quantization_report.json").read_text())
    assert facts["errors"]["metric"] == "output_error"
    block, kind = 1, facts["errors"]["kinds"].index("mlp.down_proj")
    row = run["blocks"][1]["linears"]["model.layers.1.mlp.down_proj"]
    assert facts["errors"]["values"][block][kind] == row["output_error"]
    assert facts["losses"] == [block["loss"] for block in run["blocks"]]
    shared = next(row for row in facts["outliers"] if "self_attn.q_proj" in row["kinds"])
    assert shared["kinds"] == ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert shared["before"][1] == run["blocks"][1]["linears"]["model.layers.1.self_attn.q_proj"]["outliers"]["before"]
    [fallback] = facts["fallbacks"]
    assert (fallback["kind"], fallback["count"], fallback["scheme"]) == ("mlp.down_proj", 2, "int4-g32")
    assert facts["left"][0]["names"] == ["lm_head"]
    assert facts["command"] == "quantize model --recipe recipe.toml --output DIR"
    assert facts["calibration"]["families"] == ["Python documentation"]
    assert facts["marks"] == ["builtin held-out"]


def test_what_nobody_measured_is_not_claimed(models):
    facts = facts_of(models("llama")[1])
    assert (facts["method"], facts["coverage"], facts["errors"], facts["command"]) == (None, None, None, None)
    page, text = render(facts, "html"), render(facts, "md")
    assert "No recipe lies in the checkpoint" in page
    assert "Not recorded." in page
    assert "Perplexity" not in page
    assert "Not measured" in text


def test_a_run_without_calibration_shows_weight_errors(int4):
    facts = facts_of(int4)
    assert facts["errors"]["metric"] == "weight_error"
    assert facts["outliers"] == []
    assert "outputs were not measured" in render(facts, "html")


def test_three_prompts_stand_side_by_side_by_default(awq):
    [row] = facts_of(awq)["evaluations"]["generate"]
    assert [each["prompt"] for each in row["rows"]] == list(PROMPTS)
    facts = facts_of(awq)
    after, before = "now {this}", "once <that>"
    facts["evaluations"]["generate"] = [{"rows": [{"prompt": "So", "texts": [after, before], "common": ""}]}]
    page, text = render(facts, "html"), render(facts, "md")
    assert page.index("once &lt;that&gt;") < page.index(after)
    assert "| `So` | `once <that>` | `now {this}` |" in text


def test_a_model_too_large_for_memory_writes_no_texts(models, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.after.choose_backend", lambda *given: "blocks")
    done = run_quantize(
        models("llama")[1], "--method", "rtn", "--group-size", 32, "--eval-windows", 1, "-o", tmp_path / "a"
    )
    assert done.code == 0, done.err
    assert "the models wrote no texts" in " ".join(done.out.split())
    assert [row["evaluation"] for row in read_rows(tmp_path / "a" / FILE)] == ["divergence"]


def test_texts_are_parted_where_they_differ():
    template = environment_of("html").from_string("{{ (text|parted(common))|join('|') }}")
    assert template.render(text="blue sky", common="blue s") == "blue s|ky"
    assert template.render(text="blue sky", common="red") == "|blue sky"
    assert template.render(text="blue sky", common=None) == "|blue sky"


def test_the_page_loads_it_with_the_readers_of_the_card(awq):
    facts, card = facts_of(awq), (awq / "README.md").read_text()
    assert [each["reader"] for each in facts["use"]] == ["vLLM", "SGLang", "transformers", "lowbit"]
    for kind in ("html", "md"):
        for line in ("vllm serve llama-awq", "lowbit.load(", "pip install accelerate compressed-tensors"):
            assert line in render(facts, kind)
            assert line in card


def test_an_engine_that_cannot_load_the_family_is_not_named(copied):
    report = copied / "quantization_report.json"
    run = json.loads(report.read_text())
    report.write_text(json.dumps(run | {"caveats": {"strange <weights>": ["vLLM"]}}))
    facts = facts_of(copied)
    assert [each["reader"] for each in facts["use"]] == ["transformers", "lowbit"]
    assert "strange &lt;weights&gt;" in render(facts, "html")


def test_fallbacks_are_folded(awq):
    page = render(facts_of(awq), "html")
    folded = page[page.index("<summary>Fallbacks") :]
    assert "int4-g32" in folded[: folded.index("</details>")]


def test_experts_and_tuning_are_shown_where_there_are_any(copied):
    assert facts_of(copied)["experts"] is None
    run = json.loads((copied / "quantization_report.json").read_text())
    linears = run["blocks"][0]["linears"]
    row = next(iter(linears.values()))
    for expert, tokens in enumerate((0, 7, 100)):
        linears[f"model.layers.0.mlp.experts.{expert}.up_proj"] = row | {"tokens": tokens}
    run["distilled"] = [0.5, 0.3, 0.25]
    (copied / "quantization_report.json").write_text(json.dumps(run))
    facts = facts_of(copied)
    assert facts["experts"] == {"linears": 3, "least": 0, "median": 7, "most": 100}
    for kind in ("html", "md"):
        assert "each reached by 0 to 100 calibration tokens, half of them by 7 or more" in render(facts, kind)
    assert "Tuning" in render(facts, "html")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "falcon_7b"])
def test_other_architectures(family, tmp_path):
    source = save_family(family, tmp_path / family)
    done = run_quantize(source, "--method", "int8", "--eval-windows", 0, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    facts = facts_of(tmp_path / "out")
    assert sum(row["after"] for row in facts["kinds"]) == open_checkpoint(tmp_path / "out").nbytes
    assert len(facts["errors"]["values"]) == 2
    assert len(facts["errors"]["kinds"]) < 12
    assert 'class="heat"' in render(facts, "html")


@pytest.mark.parametrize(
    ("name", "kind", "group"),
    [
        ("model.layers.3.mlp.gate_proj", "mlp.gate_proj", "feed-forward"),
        ("model.layers.3.mlp.experts.17.gate_proj", "mlp.experts.gate_proj", "experts"),
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj", "attention"),
        ("transformer.h.11.attn.c_attn", "attn.c_attn", "attention"),
        ("model.layers.0.input_layernorm", "layers.input_layernorm", "norms"),
        ("model.embed_tokens", "model.embed_tokens", "embeddings"),
        ("lm_head", "lm_head", "head"),
    ],
)
def test_kinds(name, kind, group):
    assert kind_of(name) == kind
    assert group_of(kind) == group


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Salesforce/wikitext:wikitext-2-raw-v1:train", "wikitext2-raw.valid.txt"),
        ("builtin", "builtin held-out"),
        ("allenai/c4:en", "HuggingFaceFW/fineweb"),
        ("my-notes.train.txt", "my-notes.test.txt"),
        ("NeelNanda/pile-10k", "mit-han-lab/pile-val-backup"),
    ],
)
def test_texts_of_one_family(one, other):
    assert family_of(one) == family_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("builtin", "wikitext"), ("notes.txt", "letters.txt"), ("org/c4", "org/abc4d"), ("pile", "compiler")],
)
def test_texts_of_two_families(one, other):
    assert family_of(one) != family_of(other)


def test_a_mixture_has_several_families():
    assert families_of("builtin:64, chats.jsonl:64") == ["Python documentation", "chats"]
    assert families_of(None) == []


def test_figures_are_well_formed_and_take_the_pages_colours(awq):
    facts = facts_of(awq)
    figures = figures_of(facts, facts["evaluations"]["divergence"][0])
    assert {name for name, svg in figures.items() if not svg} == {"tuning"}
    for figure in filter(None, figures.values()):
        drawn = [element[0] for element in ET.fromstring(f"<figure>{figure}</figure>")]
        assert [svg.get("viewBox").split()[2] for svg in drawn] == [str(NARROW), str(WIDE)]
        for svg in drawn:
            assert svg.get("aria-label")
            assert svg.get("width") is None
        assert "#0000" not in figure
        assert "var(--" in figure
    value = facts["errors"]["values"][1][0]
    assert f'title="block 1, {facts["errors"]["kinds"][0]}: {value:.3g}"' in render(facts, "html")


def test_the_page_needs_nothing_from_elsewhere(awq):
    page = render(facts_of(awq), "html")
    for outside in ("src=", "@import", "url(http", "<link", "fetch(", "XMLHttpRequest"):
        assert outside not in page
    links = {part.split('"')[0] for part in page.split('href="')[1:]}
    assert all(link.startswith("#") for link in links), links
    assert len(page) < 400_000
    assert page == render(facts_of(awq), "html")


def test_text_of_the_evaluation_is_never_markup(copied):
    rows = read_rows(copied / FILE)
    rows[0]["worst"][0] |= {"before": "<script>alert(1)</script>", "next": "</table>|`x`"}
    (copied / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = facts_of(copied)
    page = render(facts, "html")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "`` </table>\\|`x` ``" in render(facts, "md")


def test_no_text_of_a_checkpoint_s_files_is_markup(copied):
    """Every text in the report's own files but keys, kinds and hashes, replaced by markup."""
    evil = "\x1b[2J<img src=x>\n# owned\n```\n[a](http://evil) | **b** $x{"

    def spoiled(value, key=""):
        if isinstance(value, dict):
            return {name: spoiled(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [spoiled(each, key) for each in value]
        told = (
            "model",
            "text",
            "protocol",
            "task",
            "metric",
            "problems",
            "before",
            "next",
            "token",
            "reason",
            "baseline",
        )
        return evil if isinstance(value, str) and key in told else value

    rows = [spoiled(row) for row in read_rows(copied / FILE)]
    rows += [{"evaluation": "task", "task": evil, "metric": evil, "value": 0.5, "examples": 3, "baseline": None}]
    rows += [{"evaluation": "code", "problems": evil, "pass_at_1": 0.5, "baseline": None}]
    (copied / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = copied / "quantization_report.json"
    report.write_text(json.dumps(spoiled(json.loads(report.read_text()))))
    text, page = (render(facts_of(copied), kind) for kind in ("md", "html"))
    assert "owned" in text
    assert "owned" in page
    assert "\x1b" not in text + page
    assert "<img" not in page
    bare = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$|\\[!-/:-@\[-`{-~]", "", text)  # no blocks, nothing behind a backslash
    bare = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", bare)
    assert not re.search(r"<img|^# owned|\[a\]|://evil|\*\*b", bare, re.M)
    assert "'" + one_line(evil)[:8] in text  # the command quotes the model's name


def test_markdown_has_the_same_numbers(awq):
    facts = facts_of(awq)
    text = render(facts, "md")
    row = facts["evaluations"]["divergence"][0]
    assert f"| {row['perplexity']:.4f} |" in text
    assert f"mean {row['kl_mean']:.4g}" in text
    assert "fallback, 2 × mlp.down_proj got int4-g32" in text
    assert "same family" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) > 20
    for line, after in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if line.startswith("|") and after.startswith("|"):
            assert line.replace("\\|", "").count("|") == after.replace("\\|", "").count("|")


def test_the_command_writes_a_page_markdown_and_json(copied):
    done = run_quantize_report(copied)
    assert done.code == 0, done.err
    assert json.loads((copied / "report.json").read_text()) == facts_of(copied)
    assert (copied / "report.html").read_text() == render(facts_of(copied), "html")
    assert (copied / "report.md").read_text() == render(facts_of(copied), "md")
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=copied, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "report.json: OK" in found.stdout


def test_quantize_writes_what_it_measured(awq):
    rows = read_rows(awq / FILE)
    assert [row["evaluation"] for row in rows] == ["divergence", "generate"]
    assert rows[0]["text"] == "builtin held-out"
    assert (rows[0]["model"], rows[0]["baseline"]["model"]) == ("awq int4-g64", "model")
    assert f"mean {rows[0]['kl_mean']:.4g}, 99.9% of tokens below" in " ".join((awq / "README.md").read_text().split())
    assert "<h1>llama-awq</h1>" in (awq / "report.html").read_text()
    assert "--eval 'kll': did you mean 'kl'" in run_quantize(awq, "--eval", "kll", "-o", "x").complaint


def test_a_recorded_measurement_names_no_place(copied, models, tmp_path):
    text = tmp_path / "some-text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; " * 20)
    args = ["perplexity", copied, "--baseline", models("llama")[1], "--text", text, "--context", 64]
    assert run_quantize_eval(*args, "--record").code == 0
    assert run_quantize_eval(*args, "--record").code == 0
    rows = read_rows(copied / FILE)
    assert [(row["evaluation"], row.get("text")) for row in rows] == [
        ("divergence", "builtin held-out"),
        ("generate", None),
        ("perplexity", "some-text.txt"),
    ]
    assert (rows[2]["model"], rows[2]["baseline"]["model"]) == ("llama-awq", "model")
    assert str(tmp_path) not in (copied / FILE).read_text()
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=copied, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert len(facts_of(copied)["evaluations"]["perplexity"]) == 1


def test_a_row_that_says_little_is_shown_as_far_as_it_goes(copied):
    rows = [{"evaluation": name} for name in EVALUATIONS] + [{"evaluation": "perplexity", "perplexity": 3.5}, {}]
    (copied / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = facts_of(copied)
    for kind in ("html", "md"):
        assert "3.5" in render(facts, kind)
        assert "llama-awq" in render_comparison([facts, facts | {"name": "other"}], kind)


def test_a_later_row_takes_the_place_of_an_earlier_one():
    old = {"evaluation": "perplexity", "text": "a", "context": 64, "perplexity": 3}
    other = old | {"context": 128}
    assert merge_rows([old, other], [old | {"perplexity": 2}]) == [other, old | {"perplexity": 2}]


def test_nothing_is_recorded_for_nothing(tmp_path):
    record(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_side_by_side(awq, int4, tmp_path):
    rows = [
        {"shape": f"some/where/{name}", "batch": 1, "prompt": 128, "output": 8, "tokens_per_s": speed} | SPEED
        for name, speed in (("llama-awq", 100.0), ("llama-int4", 90.0), ("another", 1000.0))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_quantize_report(awq, int4, "--rows", tmp_path / "rows.jsonl", "-o", tmp_path / "both")
    assert done.code == 0, done.err
    values = json.loads((tmp_path / "both.json").read_text())
    base, first, second = values["points"]
    assert (base["name"], base["baseline"]) == ("model", True)
    assert [first["name"], second["name"]] == ["llama-awq", "llama-int4"]
    assert [base["speed"], first["speed"], second["speed"]] == [40.0, 100.0, 90.0]
    assert first["perplexity"] == read_rows(awq / FILE)[0]["perplexity"]
    assert base["perplexity"] == read_rows(awq / FILE)[0]["baseline"]["perplexity"]
    assert (first["marked"], second["marked"]) == (True, False)
    page, text = ((tmp_path / f"both.{kind}").read_text() for kind in ("html", "md"))
    assert "llama-awq was calibrated on text of the same family" in " ".join(page.split())
    assert page.count("<svg") == 4  # two figures, each narrow and wide
    assert "(same family)" in text
    assert "Batch 1, after 128 tokens, a GPU." in " ".join(page.split())
    assert run_quantize_report(awq, "--rows", tmp_path / "rows.jsonl", "-o", tmp_path / "one").code == 0
    assert "| a GPU | 1 | 128 | 40 | 100 | 25 | 10 |" in (tmp_path / "one.md").read_text()
    assert "50.0%" in (tmp_path / "one.html").read_text()


def test_numbers_under_other_conditions_do_not_stand_side_by_side(awq, int4):
    one, two = facts_of(awq), facts_of(int4)
    for row in two["evaluations"]["divergence"]:
        row["context"] = 77
    compared = comparison([one, two, one | {"name": "third"}])
    assert compared["apart"] == ["llama-int4"]
    assert compared["conditions"]["context"] == 512
    assert "Not scored under these conditions, so without a perplexity here: llama-int4" in render_comparison(
        [one, two, one | {"name": "third"}], "html"
    )


def test_checkpoints_that_nobody_scored(models):
    facts = [facts_of(models(name)[1]) | {"name": name} for name in ("llama", "gpt2")]
    assert comparison(facts)["conditions"] is None
    assert "Fewer than two checkpoints" in render_comparison(facts, "html")


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 9.0), (1.0, 8.0), (2.0, 8.5), (3.0, 5.0), (4.0, 5.0), (0.5, 20.0)]
    assert pareto_front(points, larger_is_better=False) == [(0.5, 20.0), (1.0, 8.0), (3.0, 5.0)]
    assert pareto_front(points, larger_is_better=True) == [(4.0, 5.0)]
    assert pareto_plot([{"name": "a", "x": 1.0, "perplexity": 2.0}], "x", "X", WIDE) is None


@pytest.mark.parametrize(
    ("value", "least", "most", "step"),
    [
        (1.0, 1.0, 1.0, HEAT_STEPS // 2),
        (5.0, 1.0, 2.0, HEAT_STEPS - 1),
        (0.0, 1.0, 2.0, 0),
        (1.5, 1.0, 2.0, HEAT_STEPS // 2),
        (10.0, 1.0, 100.0, HEAT_STEPS // 2),
        (0.0, 1.0, 100.0, 0),
        (100.0, 1.0, 100.0, HEAT_STEPS - 1),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_heat(value, least, most, step):
    assert heat_step(value, least, most) == step


def test_sizes_for_people():
    assert [megabytes(n) for n in (512, 70_270, 113_100_000, 6_020_000_000)] == [
        "0.512 kB",
        "70.27 kB",
        "113.1 MB",
        "6.02 GB",
    ]


def test_mistakes(awq, copied, tmp_path):
    assert "no directory here" in run_quantize_report("gone").complaint
    assert "named twice" in run_quantize_report(awq, awq).complaint
    assert "no such directory to write" in run_quantize_report(awq, "-o", tmp_path / "gone" / "x").complaint
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    assert (
        "rows.jsonl:1: a JSON object is expected"
        in run_quantize_report(awq, "--rows", tmp_path / "rows.jsonl").complaint
    )
    (copied / FILE).write_text("{")
    assert f"{FILE}:1: not JSON" in run_quantize_report(copied).complaint
    (copied / FILE).unlink()
    (copied / "recipe.toml").write_text("= [")
    with pytest.raises(CheckpointError, match=r"recipe\.toml: not TOML"):
        facts_of(copied)
