"""Results are stored under everything that determines them, and an interrupted evaluation is resumed."""

import json
import os
import shutil
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import pytest

from lowbit.api.recording import store
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import TransformersBackend, open_backend
from lowbit.evaluation.journal import Journal, Library
from lowbit.evaluation.perplexity import perplexity
from lowbit.evaluation.record import FILE
from lowbit.evaluation.text import Protocol, cut
from lowbit.export.files import held
from lowbit.export.plain import read_rows
from lowbit.models.source import open_source
from tests.e2e.cli import run_quantize_eval
from tests.quantized import quantize_files

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely. " * 20


class Stops(TransformersBackend):
    """A backend that is interrupted after `left` batches."""

    left = 2

    def logits(self, batches):
        for each in super().logits(batches):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield each


@pytest.fixture
def source(models):
    return open_source(str(models("llama")[1]))


def test_an_interrupted_score_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.text.BATCH_TOKENS", 64)
    text_cut, library = cut(TEXT, source, Protocol(64)), Library(tmp_path)
    whole = perplexity(open_backend("transformers", source, "cpu"), text_cut)
    with pytest.raises(KeyboardInterrupt):
        perplexity(Stops(source, "cpu"), text_cut, library)
    [journal] = tmp_path.glob("perplexity-*.jsonl")
    assert len(journal.read_text().splitlines()) == 2
    steps: list[tuple[int, int]] = []
    again = perplexity(open_backend("transformers", source, "cpu"), text_cut, library, lambda *step: steps.append(step))
    assert steps[0] == (2, len(text_cut.windows))
    assert again.window_nll.tolist() == whole.window_nll.tolist()


def test_a_full_disk_ends_the_keeping_and_not_the_evaluation(source, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.text.BATCH_TOKENS", 64)
    text_cut, notes = cut(TEXT, source, Protocol(64)), []
    whole = perplexity(open_backend("transformers", source, "cpu"), text_cut)
    library = Library(tmp_path, notes.append)
    journal = library.journal("perplexity", [open_backend("transformers", source, "cpu")], ids=text_cut.ids_sha256)
    add, full = Journal.add, tmp_path / "full"
    full.symlink_to("/dev/full")

    def until_full(self: Journal, piece: int, row: dict[str, object]) -> None:
        if piece == 2:
            self._path = full
        add(self, piece, row)

    monkeypatch.setattr(Journal, "add", until_full)
    found = perplexity(open_backend("transformers", source, "cpu"), text_cut, library)
    assert found.window_nll.tolist() == whole.window_nll.tolist()
    assert len(journal._path.read_text().splitlines()) == 2
    assert notes == [f"{tmp_path}: No space left on device; what is finished from here on is not kept"]


def test_a_finished_score_is_not_repeated(source, tmp_path):
    text_cut, library = cut(TEXT, source, Protocol(64)), Library(tmp_path)
    first = perplexity(open_backend("transformers", source, "cpu"), text_cut, library)
    stops = Stops(source, "cpu")
    stops.left = 0
    assert perplexity(stops, text_cut, library).window_nll.tolist() == first.window_nll.tolist()


def test_what_decides_the_result_decides_the_journal(source, tmp_path):
    library = Library(tmp_path / "cache")
    backend = open_backend("transformers", source, "cpu")

    def path(*backends, **facts):
        return library.journal("perplexity", list(backends), **facts)._path

    same = path(backend, ids="a")
    assert same == path(open_backend("transformers", source, "cpu"), ids="a")
    copy = tmp_path / "copy"
    shutil.copytree(source.directory, copy)
    assert same == path(open_backend("transformers", open_source(str(copy)), "cpu"), ids="a")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert same != path(open_backend("transformers", open_source(str(copy)), "cpu"), ids="a")
    assert same != path(backend, ids="b")
    assert same != path(open_backend("blocks", source, "cpu"), ids="a")
    assert same != path(backend, backend, ids="a")


def test_weights_changed_under_the_same_size_and_time_are_seen(source, tmp_path):
    copy, library = tmp_path / "copy", Library(tmp_path)
    shutil.copytree(source.directory, copy)
    weights = copy / "model.safetensors"
    before, first = weights.stat(), library.fingerprint(copy)
    assert library.fingerprint(copy) == first
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = library.fingerprint(copy)
    assert second != first
    (copy / "chat_template.jinja").write_text("another")
    assert library.fingerprint(copy) != second
    kept = library.fingerprint(copy)
    (copy / "report.json").write_text("{}")
    (tmp_path / "hashes.json").write_text("[damaged")
    assert library.fingerprint(copy) == kept


def test_a_checkpoint_that_changes_while_it_is_hashed_is_refused(source, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(source.directory, copy)

    def hashed(path):
        path.write_bytes(path.read_bytes() + b" ")
        return "0" * 64

    monkeypatch.setattr("lowbit.evaluation.journal.sha256_of", hashed)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        Library(tmp_path).fingerprint(copy)


@pytest.mark.parametrize("damaged", [b"nonsense\n", b'{"nll": 1}\n', b"[1]\n", b"\xff\n"])
def test_a_damaged_line_is_measured_again(tmp_path, damaged):
    path = tmp_path / "journal.jsonl"
    Journal(path).add(0, {"nll": 1.5})
    with path.open("ab") as file:
        file.write(damaged + b'{"piece": 2, "nll": 3.5}\n')
    assert Journal(path).rows == {0: {"nll": 1.5}}
    assert len(path.read_bytes().splitlines()) == 1


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).add(0, {"nll": 1.5})
    with path.open("a") as file:
        file.write('{"piece": 1, "nl')
    journal = Journal(path)
    assert journal.rows == {0: {"nll": 1.5}}
    journal.add(1, {"nll": 2.5})
    assert Journal(path).rows == {0: {"nll": 1.5}, 1: {"nll": 2.5}}
    assert [json.loads(line)["piece"] for line in path.read_text().splitlines()] == [0, 1]


def test_a_line_that_another_evaluation_is_writing_is_not_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).add(0, {"nll": 0.5})
    found: list[Journal] = []
    opens = Thread(target=lambda: found.append(Journal(path)))
    with held(tmp_path), path.open("a") as file:
        file.write('{"piece": 1, ')
        file.flush()
        opens.start()
        opens.join(0.5)
        assert opens.is_alive()
        file.write('"nll": 1.5}\n')
    opens.join()
    assert found[0].rows == Journal(path).rows == {0: {"nll": 0.5}, 1: {"nll": 1.5}}


def test_evaluations_that_end_at_once_all_record_their_rows(models, tmp_path, monkeypatch):
    shutil.copytree(models("llama")[1], tmp_path / "model")
    quantize_files(tmp_path / "model", "compressed-tensors", "int4-g32")

    def slow(path: Path) -> list[dict[str, Any]]:
        rows = read_rows(path)
        sleep(0.05)
        return rows

    monkeypatch.setattr("lowbit.evaluation.record.read_rows", slow)
    rows = [{"evaluation": "perplexity", "text": str(number), "perplexity": 1.0} for number in range(4)]
    ending = [Thread(target=store, args=(tmp_path / "model", [row])) for row in rows]
    for each in ending:
        each.start()
    for each in ending:
        each.join()
    assert {row["text"] for row in read_rows(tmp_path / "model" / FILE)} == set("0123")


def test_the_command_keeps_and_need_not(models, tmp_path, cache):
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["perplexity", models("llama")[1], "--text", tmp_path / "text.txt", "--context", 64]
    without = run_quantize_eval(*args, "--no-keep")
    assert not cache.exists()
    kept = run_quantize_eval(*args)
    again = run_quantize_eval(*args)
    assert len(list((cache / "evaluations").glob("*.jsonl"))) == 1
    assert without.out == kept.out == again.out


def test_an_interruption_says_what_was_kept(models, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.api.evaluating.score_text", interrupted)
    done = run_quantize_eval("perplexity", models("llama")[1], "--context", 64, "--windows", 1)
    assert done.code == 130
    assert "the same command continues from there" in done.err


def test_a_cache_that_cannot_be_written_is_gone_without(models, monkeypatch):
    monkeypatch.setattr("lowbit.api.session.cache_dir", lambda: Path("/proc/nowhere/lowbit"))
    done = run_quantize_eval("perplexity", models("llama")[1], "--context", 64, "--windows", 2)
    assert done.code == 0, done.err
    [note] = [line for line in done.out.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: /proc/nowhere/lowbit/evaluations: ")
    assert note.endswith("; what is finished is not kept")
    assert "perplexity" in json.loads(done.out.splitlines()[-1])
    quiet = run_quantize_eval("perplexity", models("llama")[1], "--context", 64, "--windows", 2, "--no-keep")
    assert "note" not in quiet.out
