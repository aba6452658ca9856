"""pass@1: correct answers count, wrong and harmful ones do not, and the rest of the run survives them."""

import json

import pytest

from lowbit.errors import DatasetError
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.code import function_body, pass_at_1, read_problems, solve
from lowbit.evaluation.sandbox import Limits
from lowbit.models.source import open_source
from tests.e2e.cli import run_quantize_eval

TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n"
BODIES = {
    "right": "    return a + b\n",
    "wrong": "    return a - b\n",
    "loops": "    while True:\n        pass\n",
    "forks": "    import os\n    while True:\n        os.fork()\n",
    "eats memory": "    x = []\n    while True:\n        x.append(bytes(10 ** 7))\n",
    "right again": "    c = a\n    return c + b\n\ndef other():\n    while True:\n        pass\n",
}


def write_problems(path, names=BODIES):
    rows = [
        {"task_id": name, "prompt": f'def add(a, b):\n    """{name}"""\n', "entry_point": "add", "test": TEST}
        for name in names
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Scripted:
    """A backend whose model writes what BODIES has for the prompt's docstring."""

    name = "transformers"

    def __init__(self, real):
        self.source, self.device, self.dtype, self.asked = real.source, real.device, real.dtype, 0

    def generate(self, prompt, tokens, stops=()):
        self.asked += 1
        tokenizer = self.source.tokenizer()
        body = BODIES[tokenizer.decode(prompt).split('"""')[1]]
        return tokenizer(body).input_ids[:tokens]


@pytest.fixture
def scripted(models):
    return Scripted(open_backend("transformers", open_source(str(models("llama")[1])), "cpu"))


def test_each_problem_is_judged_and_the_rest_survives(scripted, tmp_path):
    problems = read_problems(write_problems(tmp_path / "problems.jsonl"))
    rows = solve(scripted, problems, 512, Limits(seconds=4, nbytes=1 << 29))
    assert {row["task_id"]: row["passed"] for row in rows} == {name: name.startswith("right") for name in BODIES}
    reasons = {row["task_id"]: row["reason"] for row in rows}
    assert reasons["wrong"].startswith("AssertionError")
    assert "longer than 4 s" in reasons["loops"]
    assert "PermissionError" in reasons["forks"]
    assert "512 MiB" in reasons["eats memory"]
    assert pass_at_1(rows) == pytest.approx(2 / 6)


def test_finished_problems_are_kept(scripted, tmp_path):
    from lowbit.evaluation.journal import Library

    problems, library = read_problems(write_problems(tmp_path / "p.jsonl", ["right", "wrong"])), Library(tmp_path / "c")
    first = solve(scripted, problems, 512, Limits(), library)
    assert solve(scripted, problems, 512, Limits(), library) == first
    assert scripted.asked == 2


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("    return 1\n\n    # still\n    x = 2\nclass A:\n", "    return 1\n\n    # still\n    x = 2\n"),
        ("    return 1\nprint(f())", "    return 1\n"),
        ("    return 1\n```\nThat is it", "    return 1\n"),
        ("    return 1", "    return 1"),
    ],
)
def test_the_function_ends_at_the_margin(text, body):
    assert function_body(text) == body


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no problem in it"),
        ("{", r":1: not JSON"),
        ('{"task_id": "a", "prompt": "def f():"}', ":1: no text called entry_point, test; HumanEval's layout has"),
        ("[1]", ":1: no text called task_id"),
        ('{"task_id": "a", "prompt": "", "entry_point": "f()", "test": ""}', "is no function's name"),
    ],
)
def test_a_file_in_another_layout(tmp_path, text, message):
    (tmp_path / "problems.jsonl").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_problems(tmp_path / "problems.jsonl")


def test_the_command(models, tmp_path):
    directory = models("llama")[1]
    problems = write_problems(tmp_path / "problems.jsonl", ["right"])
    args = ["code", directory, "--baseline", directory, "--problems", problems, "--tokens", 4]
    assert "pass --allow-code" in run_quantize_eval(*args).complaint
    done = run_quantize_eval(*args, "--allow-code")
    assert done.code == 0, done.err
    row = json.loads(done.out.splitlines()[-1])
    assert row["pass_at_1"] == row["baseline"]["pass_at_1"] == 0
    assert row["rows"][0]["reason"]
    assert "gone.jsonl" in run_quantize_eval(*args[:-4], "--problems", "gone.jsonl", "--allow-code").complaint
