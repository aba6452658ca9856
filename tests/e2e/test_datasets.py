"""Calibration data of many kinds, from file to checkpoint: rows used, rows skipped, and messages."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.builders import save_family
from tests.e2e.cli import Outcome, run_quantize

SAID = "some lazy words follow the quick brown fox over the dog and more "
TURNS = [{"role": "user", "content": SAID}, {"role": "assistant", "content": SAID * 2}]
ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_family("llama", tmp_path_factory.mktemp("llama") / "llama", num_hidden_layers=1)
    (directory / "chat_template.jinja").write_text(ALTERNATING)
    return directory


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """Quantizes with a dataset: a file with this name and content, or an option's value."""

    def run(name: str, content: bytes | str, *flags: object) -> Outcome:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        data = ("--dataset", path, "--num-samples", 8, "--seqlen", 64)
        return run_quantize(model, "--method", "awq", "--group-size", 32, "--eval-windows", 0, "-o", tmp_path / "out",
                            *data, *flags)  # fmt: skip

    return run


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("alpaca.jsonl", lines([{"instruction": SAID, "input": "", "output": SAID}] * 20)),
        ("qa.jsonl", lines([{"question": SAID, "answer": SAID}] * 20)),
        ("conv.jsonl", lines([{"conversation_id": "0", "model": "x", "conversation": TURNS}] * 20)),
        ("nullfirst.jsonl", lines([{"body": None}] * 90 + [{"body": SAID}] * 20)),
        ("g.jsonl.gz", gzip.compress(lines([{"text": SAID}] * 20).encode())),
        ("wrapped.json", json.dumps({"data": [{"text": SAID}] * 20})),
    ],
)
def test_data_that_needs_no_flags(run: Run, name: str, content: bytes | str) -> None:
    outcome = run(name, content)
    assert outcome.code == 0, outcome.err
    assert "skipped" not in outcome.out


@pytest.mark.parametrize("verbose", [False, True])
def test_bad_rows_are_counted_and_named_when_asked(run: Run, verbose: bool) -> None:
    rows = lines([{"messages": TURNS}] * 20 + [{"messages": TURNS[:1] * 2}]) + '{"messages": "cut off he'
    outcome = run("trail.jsonl", rows, *(["-v"] if verbose else []))
    assert outcome.code == 0, outcome.err
    assert "note: trail.jsonl: 2 of 22 rows read skipped (row 2" in outcome.out
    assert ("trail.jsonl, row 21: the model's chat template refuses a chat" in outcome.out) is verbose
    assert ("trail.jsonl, row 22: not JSON (Unterminated string" in outcome.out) is verbose


def test_a_refused_system_turn_is_folded_and_said(run: Run) -> None:
    outcome = run("sys.jsonl", lines([{"messages": [{"role": "system", "content": SAID}, *TURNS]}] * 20))
    assert outcome.code == 0, outcome.err
    assert "note: sys.jsonl: 20 system turns, which the chat template refuses, put into the user's" in outcome.out


def test_a_cache_that_cannot_be_written_is_not_needed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "HF_CACHE_HOME"):
        monkeypatch.setattr(f"datasets.config.{name}", Path("/proc/nowhere"))
    assert run("a.jsonl", lines([{"text": SAID}] * 20)).code == 0


def test_windows_longer_than_the_models_positions_are_noted(run: Run, model: Path) -> None:
    outcome = run("long.txt", SAID * 2000, "--seqlen", 1025)
    assert outcome.code == 0, outcome.err
    assert "note: calibration windows of 1025 tokens are longer than the 1024 positions" in outcome.out


def test_a_token_beyond_the_vocabulary_is_one_line(run: Run, model: Path) -> None:
    path = model / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"a": 64', '"a": 260'))
    try:
        assert path.read_text() != text
        assert "token 260 is none of the model's 260: the tokenizer" in run("a.txt", SAID * 40).complaint
    finally:
        path.write_text(text)
