"""lm-evaluation-harness by our backends equals the harness by transformers, on tasks that need no network."""

import json

import pytest

from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.journal import Library
from lowbit.evaluation.tasks import TaskList, harness_model, run_tasks
from lowbit.models.source import open_source
from tests.builders import make_tokenizer
from tests.e2e.cli import run_quantize_eval

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.peer

CHOICE = """task: lowbit_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{q}}}} A:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
ROLLING = """task: lowbit_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITTEN = """task: lowbit_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"what is {i} plus {i * 7 % 5}", "choices": ["red", "seven", f"no{i}", " a b"], "answer": i % 4}
        for i in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


@pytest.fixture(scope="module")
def known(folder):
    return TaskList(["lowbit_choice", "lowbit_rolling", "lowbit_written"], folder)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("backend", ["transformers", "engine"])
def test_it_is_the_harness_through_transformers(models, known, family, backend):
    from lm_eval.models.huggingface import HFLM

    model, directory = models(family)
    theirs = known.harness.simple_evaluate(
        HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=4),
        tasks=known.names,
        task_manager=known.manager,
        bootstrap_iters=10,
    )
    rows = run_tasks(open_backend(backend, open_source(str(directory)), "cpu"), known)
    found = {(row["task"], row["metric"]): row["value"] for row in rows}
    expected = {
        (task, metric): theirs["results"][task][f"{metric},none"]
        for task, metric in (
            ("lowbit_choice", "acc"),
            ("lowbit_choice", "acc_norm"),
            ("lowbit_rolling", "word_perplexity"),
            ("lowbit_rolling", "bits_per_byte"),
            ("lowbit_written", "exact_match"),
        )
    }
    assert set(found) >= set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert {row["examples"] for row in rows} == {24}


def test_each_log_likelihood_is_the_harnesss_own(models, known):
    """Every log-likelihood, not only the scores, also if context and answer exceed the model's positions."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, directory = models("llama")
    pairs = [("", "red"), ("Q: ", "seven"), ("long " * 300, "answer"), ("a", "b" * 1000), ("space ", "d out")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ours = harness_model(open_backend("transformers", open_source(str(directory)), "cpu")).loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=1).loglikelihood(requests)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy


def test_a_written_answer_stops(models, known):
    from lm_eval.api.instance import Instance

    directory = models("llama")[1]
    backend = open_backend("transformers", open_source(str(directory)), "cpu")
    text = make_tokenizer().decode(backend.generate(make_tokenizer()("abc").input_ids, 12))
    stop = text[3:5]
    request = Instance("generate_until", {}, ("abc", {"until": [stop], "max_gen_toks": 12}), 0)
    assert harness_model(backend).generate_until([request]) == [text.split(stop)[0]]


def test_finished_requests_are_kept(models, folder, tmp_path):
    backend = open_backend("transformers", open_source(str(models("llama")[1])), "cpu")
    first = run_tasks(backend, TaskList(["lowbit_choice"], folder), library=Library(tmp_path))
    backend.logits = lambda batches: iter(())
    assert run_tasks(backend, TaskList(["lowbit_choice"], folder), library=Library(tmp_path)) == first


def test_an_unknown_task_names_the_nearest(models, folder):
    args = ["tasks", models("llama")[1], "--include", folder, "--tasks"]
    complaint = run_quantize_eval(*args, "lowbit_choise").complaint
    assert "unknown task 'lowbit_choise'; did you mean 'lowbit_choice'?" in complaint
    assert "no such file" in run_quantize_eval(*args, "gone.yaml").complaint
    assert "no such directory" in run_quantize_eval(*args[:2], "--include", "gone", "--tasks", "arc").complaint


def test_sampling_is_refused(models, folder, tmp_path):
    text = WRITTEN.replace("do_sample: false", "do_sample: true, temperature: 0.7").replace("written", "sampled")
    (tmp_path / "sampled.yaml").write_text(text.format(data=folder / "data.jsonl"))
    complaint = run_quantize_eval("tasks", models("llama")[1], "--tasks", tmp_path / "sampled.yaml").complaint
    assert "asks for sampled answers" in complaint


def test_data_that_cannot_be_had(models, folder, tmp_path):
    text = CHOICE.replace("dataset_path: json", "dataset_path: nobody/has-this").format(data=folder / "data.jsonl")
    (tmp_path / "hub.yaml").write_text(text)
    complaint = run_quantize_eval("tasks", models("llama")[1], "--tasks", tmp_path / "hub.yaml").complaint
    assert "hub.yaml: the harness could not run it" in complaint
    assert "needs the network" in complaint


def test_an_answer_that_exceeds_the_positions(models):
    from lm_eval.api.instance import Instance

    model = harness_model(open_backend("transformers", open_source(str(models("llama")[1])), "cpu"))
    with pytest.raises(CheckpointError, match="an answer of 1500 tokens: the model has positions for 1024"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", "b" * 1500), 0)])


def test_the_command(models, folder):
    directory = models("llama")[1]
    done = run_quantize_eval("tasks", directory, "--baseline", directory, "--tasks", folder / "choice.yaml")
    assert done.code == 0, done.err
    rows = {row["metric"]: row for row in json.loads(done.out.splitlines()[-1])["rows"]}
    assert rows["acc"]["value"] == rows["acc"]["baseline"]["value"]
    assert (rows["acc"]["version"], rows["acc"]["examples"], rows["acc"]["fewshot"]) == (3, 24, 0)


def test_without_the_harness_it_says_what_to_install(models, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r'pip install "lowbit\[tasks\]"'):
        TaskList(["arc_easy"])
