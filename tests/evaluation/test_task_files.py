"""Task files: every way of running Python from one is found before the harness sees it, and plain files pass."""

import json
from pathlib import Path

import pytest

from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.task_files import require_data_alone
from lowbit.evaluation.tasks import TaskList, run_tasks
from lowbit.models.source import open_source
from tests.e2e.cli import run_quantize_eval

METRICS = frozenset({"acc"})
NOWHERE = Path("/nowhere")
PLAIN = """task: plain
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
RUNS_CODE = {
    "a function": ("doc_to_text: !function evil.f", r"it has !function evil.f, which is code; pass --allow-code"),
    "a function deep inside": ("a: [{b: {c: !function os.system}}]", "!function os.system"),
    "a function as a key": ("{!function os.system : 1}", "!function os.system"),
    "a function behind an alias": ("a: &x !function os.system\nb: *x", "!function os.system"),
    "a Python object": ("a: !!python/object/apply:os.system ['true']", "!!python/object/apply:os.system"),
    "a Python name": ("a: !!python/name:os.system ''", "!!python/name:os.system"),
    "a class": ("class: evil.Task", "it has class: evil.Task"),
    "another's prompt": ("use_prompt: evil.yaml:a", "it has use_prompt: evil.yaml:a"),
    "a metric of a file": ("metric_list: [{metric: ./evil.py}]", r"its metric './evil.py' is none of the harness's"),
    "a metric of a hub": ("metric_list: [{metric: acc, hf_evaluate: true}]", "hf_evaluate"),
    "pickles": ("dataset_path: pandas", "its data are pickles"),
    "an included file": ("include: [inside.txt]", r"inside\.txt: it has !function evil\.f"),
}


@pytest.mark.parametrize("what", RUNS_CODE)
@pytest.mark.parametrize("of", ["file", "folder"])
def test_code_is_found(tmp_path, what, of):
    text, message = RUNS_CODE[what]
    (tmp_path / "my.yaml").write_text(text)
    (tmp_path / "inside.txt").write_text("process_docs: !function evil.f")
    with pytest.raises(UsageError, match=message):
        require_data_alone([tmp_path / "my.yaml" if of == "file" else tmp_path], NOWHERE, METRICS)


def test_plain_files_pass_and_the_harness_s_own_may_run_code(tmp_path):
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "theirs.yaml").write_text("doc_to_text: !function utils.f")
    plain = PLAIN.format(data="x.jsonl", text="{{q}}")
    (tmp_path / "my.yaml").write_text(
        f"include: [harness/theirs.yaml, my.yaml, gone.yaml]\n{plain}hf_evaluate: false\n"
    )
    require_data_alone([tmp_path / "my.yaml"], tmp_path / "harness", METRICS)


@pytest.mark.parametrize("text", ["a: [", "[" * 5000, "a: \x00", "\ud800"])
def test_what_is_no_yaml_is_an_error(tmp_path, text):
    (tmp_path / "my.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=r"my\.yaml: no YAML that can be read"):
        require_data_alone([tmp_path / "my.yaml"], NOWHERE, METRICS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "what"}) + "\n")
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\ndef f(doc): return 'x'\n"
    )
    text = PLAIN.format(data=tmp_path / "data.jsonl", text="x").replace('"x"', "!function evil.f")
    (tmp_path / "my.yaml").write_text(text)
    return tmp_path


@pytest.mark.peer
def test_the_command_runs_it_with_the_flag_alone(models, folder):
    pytest.importorskip("lm_eval")
    args = ("tasks", models("llama")[1], "--tasks", folder / "my.yaml")
    assert "pass --allow-code" in run_quantize_eval(*args).complaint
    assert not (folder / "ran").exists()
    done = run_quantize_eval(*args, "--allow-code")
    assert done.code == 0, done.err
    assert (folder / "ran").exists()


@pytest.mark.peer
def test_templates_reach_no_python(models, folder):
    pytest.importorskip("lm_eval")
    backend = open_backend("transformers", open_source(str(models("llama")[1])), "cpu")
    escape = f"{{{{ cycler.__init__.__globals__.os.mkdir('{folder}/ran') }}}}"
    for text, message in ((escape, "SecurityError"), ("{{q}}", "")):
        (folder / "my.yaml").write_text(PLAIN.format(data=folder / "data.jsonl", text=text))
        tasks = TaskList([str(folder / "my.yaml")])
        if message:
            with pytest.raises(CheckpointError, match=message):
                run_tasks(backend, tasks)
        else:
            assert run_tasks(backend, tasks)[0]["examples"] == 1
    assert not (folder / "ran").exists()
