"""Task files: every way of running Python from one is found before the harness sees it, and plain files pass."""

import json
import os
from itertools import pairwise

import pytest

from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.task_files import Harness, require_data_alone, require_own_data
from lowbit.evaluation.tasks import TaskList, run_tasks
from lowbit.models.source import open_source
from tests.e2e.cli import run_quantize_eval

HARNESS = Harness(frozenset({"acc"}), frozenset({"json", "pandas", "hdf5", "iceberg"}))
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
    "a metric behind an alias": ("metric_list: [{metric: &x ./evil.py}]\nz: *x", r"its metric './evil.py'"),
    "a dataset that is a function": ("custom_dataset: evil.f", "it has custom_dataset: evil.f"),
    "answers run as code": ("unsafe_code: false", "it has unsafe_code"),
    "pickles": ("dataset_path: pandas", "its data are read by 'pandas', which is none of json, csv"),
    "files that lead to others": ("dataset_path: hdf5", "its data are read by 'hdf5'"),
    "a catalogue that names a class": ("dataset_path: iceberg", "its data are read by 'iceberg'"),
    "a cache elsewhere": ("dataset_kwargs: {cache_dir: /etc}", "its data set has the setting 'cache_dir'"),
    "a merged setting": ("a: &x {num_proc: 999}\ndataset_kwargs: {<<: *x}", "its data set has the setting '<<'"),
    "a data file of the network": (
        "dataset_kwargs: {data_files: {test: ['http://127.0.0.1/x']}}",
        r"its data come from an address \(http://127\.0\.0\.1/x\)",
    ),
    "a data set of the network": ("dataset_path: zip://a::http://127.0.0.1", "its data come from an address"),
    "aliases that grow": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdef")),
        "more than 100000 values",
    ),
    "an alias inside itself": ("a: &x [*x]", "an alias inside itself"),
    "a number without end": (f"a: {'1:' * 600}1", "it has a number of 1201 characters"),
    "a device": ("include: /dev/zero", "/dev/zero: a device, where a file is expected"),
    "an included file": ("include: [inside.txt]", r"inside\.txt: it has !function evil\.f"),
}


@pytest.mark.parametrize("what", RUNS_CODE)
@pytest.mark.parametrize("of", ["file", "folder"])
def test_code_is_found(tmp_path, what, of):
    text, message = RUNS_CODE[what]
    (tmp_path / "my.yaml").write_text(text)
    (tmp_path / "inside.txt").write_text("process_docs: !function evil.f")
    with pytest.raises(UsageError, match=message):
        require_data_alone([tmp_path / "my.yaml" if of == "file" else tmp_path], HARNESS)


def test_plain_files_pass(tmp_path):
    plain = PLAIN.format(data="x.jsonl", text="{{q}}")
    (tmp_path / "theirs.yaml").write_text("doc_to_text: '{{q}}'")
    (tmp_path / "my.yaml").write_text(f"include: [theirs.yaml, my.yaml, gone.yaml]\n{plain}hf_evaluate: false\n")
    require_data_alone([tmp_path / "my.yaml"], HARNESS)
    require_data_alone([tmp_path], HARNESS)


def test_a_pipe_among_the_files_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "my.yaml")
    with pytest.raises(UsageError, match=r"my\.yaml: a pipe, where a file is expected"):
        require_data_alone([tmp_path], HARNESS)


GROUPS = {
    "a group": {"g": "group: g\ntask: [theirs]\ndataset_path: json"},
    "a member": {"g": "group: g\ntask: [{task: theirs, dataset_kwargs: {data_files: x.jsonl}}]"},
    "an included file": {"g": "group: g\ninclude: more.txt\ntask: [theirs]", "more": "dataset_name: other"},
    "a group of groups": {"g": "group: g\ntask: [inner]\ndataset_path: json", "h": "group: inner\ntask: [theirs]"},
}


@pytest.mark.parametrize("what", GROUPS)
def test_no_group_gives_the_harness_s_tasks_other_data(tmp_path, what):
    """Some of the harness's functions evaluate text of their data."""
    for name, text in GROUPS[what].items():
        (tmp_path / f"{name}{'.txt' if name == 'more' else '.yaml'}").write_text(text)
    with pytest.raises(UsageError, match="a group gives the harness's task 'theirs' other data"):
        require_own_data([tmp_path], frozenset({"theirs"}))


def test_a_group_of_own_and_of_the_harness_s_tasks_passes(tmp_path):
    (tmp_path / "g.yaml").write_text("group: g\ntask: [theirs, {task: theirs, num_fewshot: 2}, mine]")
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json")
    require_own_data([tmp_path], frozenset({"theirs"}))


@pytest.mark.parametrize("text", ["a: [", "[" * 5000, "a: \x00", "\ud800"])
def test_what_is_no_yaml_is_an_error(tmp_path, text):
    (tmp_path / "my.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=r"my\.yaml: no YAML that can be read"):
        require_data_alone([tmp_path / "my.yaml"], HARNESS)


@pytest.fixture(scope="module")
def dense(models):
    pytest.importorskip("lm_eval")
    return open_backend("transformers", open_source(str(models("llama")[1])), "cpu")


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


FIELDS = ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "description")
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ESCAPE = "{{ cycler.__init__.__globals__.os.mkdir('RAN') }}"
HOSTILE = {
    LOOPS: "my.yaml: a template takes more than 512 MiB or 1 s",
    "{{ 'x' * 10**10 }}": "my.yaml: a template takes more than 512 MiB or 1 s",
    "{{ ('x' * 10**9) ~ ('x' * 10**9) }}": "my.yaml: a template takes more than 512 MiB or 1 s",
    "{{ ('a' * 40 + 'b') | regex_replace('(a+)+$', '') }}": "my.yaml: a template takes more than 512 MiB or 1 s",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ missing }}": "UndefinedError",
    "{% include '/etc/passwd' %}": "AttributeError|TypeError",
    f"{{{{ {'(' * 9999} }}}}": "the harness could not run it",
}


def render(folder, backend, field, text):
    """Run a task with `text` as a field of it; RAN in it stands for a file that must not appear."""
    lines = [line for line in PLAIN.format(data=folder / "data.jsonl", text="x").splitlines() if field not in line]
    value = json.dumps(text.replace("RAN", str(folder / "ran")))
    (folder / "my.yaml").write_text("\n".join([*lines, f"{field}: {value}"]))
    run_tasks(backend, TaskList([str(folder / "my.yaml")]))


@pytest.mark.peer
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", [ESCAPE, LOOPS])
def test_templates_reach_no_python_and_end_in_time(folder, dense, monkeypatch, text, field):
    monkeypatch.setattr("lowbit.evaluation.tasks.SECONDS", 1)
    with pytest.raises(CheckpointError, match="SecurityError" if text == ESCAPE else HOSTILE[LOOPS]):
        render(folder, dense, field, text)
    assert not (folder / "ran").exists()


@pytest.mark.peer
@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_template_may_do_ends_in_an_error(folder, dense, monkeypatch, text):
    monkeypatch.setattr("lowbit.evaluation.tasks.SECONDS", 1)
    with pytest.raises(CheckpointError, match=HOSTILE[text]):
        render(folder, dense, "doc_to_text", text)


@pytest.mark.peer
def test_a_plain_template_is_rendered(folder, dense):
    (folder / "my.yaml").write_text(PLAIN.format(data=folder / "data.jsonl", text="{{q}}"))
    assert run_tasks(dense, TaskList([str(folder / "my.yaml")]))[0]["examples"] == 1


@pytest.mark.peer
def test_a_slow_pattern_of_a_filter_ends_in_time(folder, dense, monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.tasks.STEP_SECONDS", 1)
    monkeypatch.setattr(
        "lowbit.evaluation.tasks.Adapter.generate_until", lambda self, asked: ["a" * 40 + "b"] * len(asked)
    )
    (folder / "my.yaml").write_text(
        PLAIN.format(data=folder / "data.jsonl", text="{{q}}").replace("multiple_choice", "generate_until")
        + "filter_list: [{name: f, filter: [{function: regex, regex_pattern: '(a+)+$'}]}]\n"
    )
    with pytest.raises(CheckpointError, match=r"my\.yaml: apply_filters takes more than 16384 MiB or 1 s"):
        run_tasks(dense, TaskList([str(folder / "my.yaml")]))
