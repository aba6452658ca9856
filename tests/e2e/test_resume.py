"""A killed and resumed run writes the same bytes as an uninterrupted one; the journal of another run is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from filecmp import cmp
from pathlib import Path

import pytest
import torch

from lowbit.calibrate.blocks import BlockLoop
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.calibrate.report import BlockReport
from lowbit.calibrate.resume import Journal, journal_of, journaled, key_of
from lowbit.errors import CheckpointError
from lowbit.models.source import open_source
from tests.builders import calibration, save_family
from tests.e2e.cli import names, run_quantize

QUICK = {"group_size": 32}
RECIPES = {
    "awq": {"method": "awq", **QUICK},
    "awq, asymmetric": {"method": "awq", "symmetric": False, **QUICK},
    "gptq": {"method": "gptq", **QUICK},
    "awq, then gptq": {"method": "awq", "rounder": "gptq", **QUICK},
    "smoothquant": {"method": "smoothquant"},
    "smoothquant, static": {"method": "smoothquant", "activations": "tensor"},
    "signround": {"method": "signround", "iters": 4, **QUICK},
    "best": {"method": "best", "iters": 3, "distill_steps": 3, "distill_codes": True, **QUICK},
}
BLOCKS = 3


class Killed(BaseException):
    """A stand-in for a signal."""


def kill_after(blocks: int) -> Callable[[BlockReport], None]:
    """Ends the run once so many blocks are finished."""

    def on_block(report: BlockReport) -> None:
        if report.index + 1 == blocks:
            raise Killed

    return on_block


def quantize(
    source: Path,
    output: Path,
    recipe: str | dict[str, object],
    on_block: Callable[[BlockReport], None] = lambda report: None,
    tokens: CalibrationSet | None = None,
) -> dict[str, bytes]:
    """The files of a run that resumes from a journal next to `output`, if there is one."""
    values = RECIPES[recipe] if isinstance(recipe, str) else recipe
    job = prepare(open_source(str(source)), complete_recipe(values), "cpu")
    tokens = (tokens or calibration()) if job.recipe.dataset else None
    output.mkdir(exist_ok=True)
    with journaled(output, job, tokens, resume=True) as journal:
        run(job, output, tokens, on_block, journal)
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp(family) / "model"
            made[family] = save_family(family, directory, torch.bfloat16, num_hidden_layers=BLOCKS)
        return made[family]

    return source


@pytest.mark.parametrize(("recipe", "finished"), [*((recipe, 2) for recipe in RECIPES), ("best", 3), ("gptq", 1)])
def test_a_killed_run_goes_on_to_the_same_bytes(sources, tmp_path, recipe, finished):
    source, output = sources("llama"), tmp_path / "out"
    wanted = quantize(source, tmp_path / "straight", recipe)
    with pytest.raises(Killed):
        quantize(source, output, recipe, kill_after(finished))
    assert names(journal_of(output))[-1] == "key.json"
    assert len(names(journal_of(output))) == 1 + 2 * finished
    for path in output.iterdir():
        path.unlink()
    replayed: list[BlockReport] = []
    found = quantize(source, output, recipe, replayed.append)
    assert [report.index for report in replayed] == [0, 1, 2]
    assert found == wanted
    assert not journal_of(output).exists()


def test_a_run_without_calibration_keeps_no_journal(sources, tmp_path):
    """Rounding takes no longer than reading what it made."""
    source, output, recipe = sources("llama"), tmp_path / "out", {"method": "int8"}
    with pytest.raises(Killed):
        quantize(source, output, recipe, kill_after(2))
    assert not journal_of(output).exists()
    for path in output.iterdir():
        path.unlink()
    assert quantize(source, output, recipe) == quantize(source, tmp_path / "straight", recipe)


@pytest.mark.parametrize(
    ("family", "recipe"), [("mixtral", "awq"), ("mixtral", "signround"), ("gemma2", "gptq"), ("gpt2", "smoothquant")]
)
def test_other_families(sources, tmp_path, family, recipe):
    """Experts cut from one parameter, norms with an offset, blocks of two kinds, transposed weights with biases."""
    source, output = sources(family) if family != "gpt2" else save_family("gpt2", tmp_path / "gpt2"), tmp_path / "out"
    wanted = quantize(source, tmp_path / "straight", recipe)
    with pytest.raises(Killed):
        quantize(source, output, recipe, kill_after(1))
    for path in output.iterdir():
        path.unlink()
    assert quantize(source, output, recipe) == wanted


def test_finished_blocks_are_not_done_again(sources, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        quantize(sources("llama"), tmp_path / "out", "awq", kill_after(2))
    done: list[int] = []
    quantize_block = BlockLoop.quantize
    monkeypatch.setattr(BlockLoop, "quantize", lambda self, i: done.append(i) or quantize_block(self, i))
    (tmp_path / "out").rename(tmp_path / "aside")
    quantize(sources("llama"), tmp_path / "out", "awq")
    assert done == [2]


@pytest.fixture
def stopped(sources, tmp_path) -> Path:
    """The output of an awq run that was killed after its first block."""
    with pytest.raises(Killed):
        quantize(sources("llama"), tmp_path / "out", "awq", kill_after(1))
    return tmp_path / "out"


def test_another_recipe_is_refused(sources, stopped):
    with pytest.raises(CheckpointError, match="with another recipe: seed 42, not 7; run without --resume"):
        quantize(sources("llama"), stopped, RECIPES["awq"] | {"seed": 7})
    assert journal_of(stopped).exists()


def test_other_tokens_are_refused(sources, stopped):
    with pytest.raises(CheckpointError, match=r"calibration tokens [0-9a-f]{64}, not [0-9a-f]{64}"):
        quantize(sources("llama"), stopped, "awq", tokens=calibration(seed=2))


def test_another_model_is_refused(stopped, tmp_path):
    other = save_family("llama", tmp_path / "other", torch.bfloat16, num_hidden_layers=BLOCKS, seed=5)
    with pytest.raises(CheckpointError, match=r"of a model with another model.safetensors"):
        quantize(other, stopped, "awq")


def test_another_version_is_refused(sources, stopped, monkeypatch):
    monkeypatch.setattr("lowbit.calibrate.resume.__version__", "0.0.0")
    with pytest.raises(CheckpointError, match=r"with lowbit [0-9a-z.]+, not 0\.0\.0"):
        quantize(sources("llama"), stopped, "awq")


def truncate(journal: Path) -> None:
    path = journal / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(journal: Path) -> None:
    path = journal / "block-00001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def lose_a_linear(journal: Path) -> None:
    """A row that is valid JSON but lacks one weight."""
    path = journal / "block-00001.json"
    row = json.loads(path.read_text())
    row["weights"].pop(next(iter(row["weights"])))
    path.write_text(json.dumps(row))


def cut_the_row(journal: Path) -> None:
    (journal / "block-00001.json").write_text('{"wei')


def lose_the_tensors(journal: Path) -> None:
    (journal / "block-00001.safetensors").unlink()


def lose_the_key(journal: Path) -> None:
    (journal / "key.json").write_text("")


def turn_the_key(journal: Path) -> None:
    """Valid JSON, but another seed."""
    path = journal / "key.json"
    path.write_text(path.read_text().replace('"seed": 42', '"seed": 43'))


def put_directories_in_the_way(journal: Path) -> None:
    for path in journal.glob("block-00001.*"):
        path.unlink()
        (path / "inside").mkdir(parents=True)


def swap_blocks(journal: Path) -> None:
    """The first two blocks, whole, in each other's place."""
    for path in journal.glob("block-00000.*"):
        other = journal / path.name.replace("00000", "00001")
        here, there = path.read_bytes(), other.read_bytes()
        path.write_bytes(there)
        other.write_bytes(here)


def put_a_pipe(journal: Path) -> None:
    (journal / "block-00001.safetensors").unlink()
    os.mkfifo(journal / "block-00001.safetensors")


def take_anothers_block(journal: Path) -> None:
    """The block of a run with another recipe, as if two runs had written to one output."""
    for path in (journal.parent / ".other.journal").glob("block-00001.*"):
        path.replace(journal / path.name)


@pytest.mark.parametrize(
    ("harm", "kept", "said"),
    [
        (truncate, 1, "block 2 in .* is damaged: block-00001.safetensors is not what was written"),
        (flip_a_bit, 1, "block 2 in .* is damaged: block-00001.safetensors is not what was written"),
        (lose_a_linear, 1, "block 2 in .* is damaged: block-00001.json is not what was written"),
        (cut_the_row, 1, "block 2 in .* is damaged: .*not JSON"),
        (lose_the_tensors, 1, "block 2 in .* is damaged: block-00001.safetensors is missing"),
        (take_anothers_block, 1, "block 2 in .* is damaged: it is of another run"),
        (lose_the_key, 2, "key.json: not JSON"),
        (turn_the_key, 2, "key.json is not what was written"),
        (put_directories_in_the_way, 1, "block 2 in .* is damaged: .*block-00001.json: a directory"),
        (swap_blocks, 0, "block 1 in .* is damaged: it is of another run"),
        (put_a_pipe, 1, "block 2 in .* is damaged: .*a pipe, where a file is expected"),
    ],
)
def test_a_damaged_journal_keeps_what_is_sound(sources, tmp_path, harm, kept, said):
    """The remaining blocks are done again, with the bytes of an uninterrupted run."""
    source, output, recipe = sources("llama"), tmp_path / "out", RECIPES["gptq"]
    for name, changes in (("out", {}), ("other", {"seed": 5})):
        with pytest.raises(Killed):
            quantize(source, tmp_path / name, recipe | changes, kill_after(2))
    harm(journal_of(output))
    for path in output.iterdir():
        path.unlink()
    job = prepare(open_source(str(source)), complete_recipe(recipe), "cpu")
    with journaled(output, job, calibration(), resume=True) as journal:
        assert journal.finished == kept
        assert re.search(said, journal.damage or "")
        run(job, output, calibration(), lambda report: None, journal)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == quantize(
        source, tmp_path / "straight", recipe
    )


def test_blocks_behind_one_that_was_done_again_do_not_count(sources, tmp_path):
    """Later blocks of the journal are not used after a repeated block that differs."""
    source, recipe = sources("llama"), RECIPES["gptq"]
    with pytest.raises(Killed):
        quantize(source, tmp_path / "out", recipe, kill_after(3))
    job = prepare(open_source(str(source)), complete_recipe(recipe), "cpu")
    journal = Journal(journal_of(tmp_path / "out"), key_of(job, calibration(), {}))
    journal.resume()
    outcome = journal.read(1)
    assert (journal.finished, journal.damage) == (3, None)
    flip_a_bit(journal.directory)
    again = Journal(journal.directory, key_of(job, calibration(), {}))
    again.resume()
    next(iter(outcome.weights.values())).scales.mul_(2)
    again.add(1, outcome)
    last = Journal(journal.directory, key_of(job, calibration(), {}))
    last.resume()
    assert (again.finished, last.finished) == (1, 2)
    assert "it is of another run" in last.damage


def test_a_second_run_to_the_same_output_is_refused(sources, tmp_path):
    """Also for a run in another process that would resume the first one's blocks."""
    job = prepare(open_source(str(sources("llama"))), complete_recipe({"method": "rtn", **QUICK}), "cpu")
    arguments = [sources("llama"), "--method", "rtn", "--group-size", 32, "--eval-windows", 0, "--resume"]
    with journaled(tmp_path / "out", job, None, resume=False):
        code = "from lowbit.commands.quantize import main; main()"
        command = [sys.executable, "-c", code, *map(str, arguments), "-o", str(tmp_path / "out")]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert (
        second.stderr == f"Error: {tmp_path / 'out'}: another run is writing there; wait, or name another directory\n"
    )


def test_a_journal_that_is_a_link_is_not_followed(sources, stopped, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    journal_of(stopped).rename(elsewhere)
    before = names(elsewhere)
    journal_of(stopped).symlink_to(elsewhere)
    for path in stopped.iterdir():
        path.unlink()
    quantize(sources("llama"), stopped, "awq")
    assert names(elsewhere) == before


def test_a_source_that_changes_is_no_result(tmp_path):
    """The weights are replaced by another model's during a run: no output appears, and finished blocks stay."""
    source = save_family("llama", tmp_path / "model", torch.bfloat16, num_hidden_layers=BLOCKS)
    other = save_family("llama", tmp_path / "other", torch.bfloat16, num_hidden_layers=BLOCKS, seed=9)

    def change(report: BlockReport) -> None:
        if report.index == 0:
            (other / "model.safetensors").replace(source / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
        quantize(source, tmp_path / "out", "gptq", change)
    assert "block-00000.json" in names(journal_of(tmp_path / "out"))


def test_a_configuration_that_changes_is_noticed(tmp_path):
    source = save_family("llama", tmp_path / "model", torch.bfloat16, num_hidden_layers=BLOCKS)

    def change(report: BlockReport) -> None:
        (source / "tokenizer_config.json").write_text("{}")

    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: changed while it was read"):
        quantize(source, tmp_path / "out", {"method": "int8"}, change)
    assert "config.json" not in names(tmp_path / "out")


def test_a_block_whose_row_was_not_written_is_done_again(sources, stopped, tmp_path):
    (journal_of(stopped) / "block-00000.json").unlink()
    for path in stopped.iterdir():
        path.unlink()
    assert quantize(sources("llama"), stopped, "awq") == quantize(sources("llama"), tmp_path / "straight", "awq")


def test_the_flag(sources, tmp_path, monkeypatch):
    """On the command line: after a kill and --resume, every file equals that of an uninterrupted run."""
    flags = ["--method", "gptq", "--group-size", 32, "--num-samples", 4, "--seqlen", 32, "--eval-windows", 1]
    source, output = sources("llama"), tmp_path / "out"
    assert run_quantize(source, *flags, "-o", tmp_path / "straight" / "out").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            "lowbit.commands.quantize_console.Printer.block", lambda printer, event: kill_with_a_signal(event.report)
        )
        interrupted = run_quantize(source, *flags, "-o", output)
    assert interrupted.code == 130
    assert "see --resume" in interrupted.err
    assert names(tmp_path) == [".out.journal", "straight"]
    done = run_quantize(source, *flags, "--resume", "-o", output)
    assert done.code == 0, done.err
    assert "1 blocks were finished before" in done.out
    assert names(tmp_path) == ["out", "straight"]
    assert names(output) == names(tmp_path / "straight" / "out")
    other = [name for name in names(output) if not cmp(output / name, tmp_path / "straight" / "out" / name, False)]
    assert other == []  # by name: this failed once, and the bytes of all files told nobody why


def kill_with_a_signal(report: BlockReport) -> None:
    raise KeyboardInterrupt
