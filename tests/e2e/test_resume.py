"""A run that is killed and goes on writes the bytes of one that never stopped; a journal of another run is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit.calibrate.blocks import BlockLoop
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import BlockReport, prepare, run
from lowbit.calibrate.resume import journal_of, journaled
from lowbit.errors import CheckpointError
from lowbit.models.source import open_source
from tests.builders import calibration, save_family
from tests.e2e.cli import names, run_quantize

QUICK = {"group_size": 32}
RECIPES = {
    "int8": {"method": "int8"},
    "rtn": {"method": "rtn", **QUICK},
    "awq": {"method": "awq", **QUICK},
    "awq, asymmetric": {"method": "awq", "symmetric": False, **QUICK},
    "gptq": {"method": "gptq", **QUICK},
    "awq, then gptq": {"method": "awq", "rounder": "gptq", **QUICK},
    "smoothquant": {"method": "smoothquant"},
    "smoothquant, static": {"method": "smoothquant", "activations": "tensor"},
    "signround": {"method": "signround", "iters": 4, **QUICK},
    "best": {"method": "best", "iters": 3, "distill_steps": 3, **QUICK},
}
BLOCKS = 3


class Killed(BaseException):
    """What stands for a signal in these tests."""


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
    """The files of a run that goes on from a journal beside `output`, if there is one."""
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


def test_a_damaged_block_is_refused(sources, stopped):
    path = journal_of(stopped) / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        quantize(sources("llama"), stopped, "awq")


def test_a_block_whose_row_was_not_written_is_done_again(sources, stopped, tmp_path):
    (journal_of(stopped) / "block-00000.json").unlink()
    for path in stopped.iterdir():
        path.unlink()
    assert quantize(sources("llama"), stopped, "awq") == quantize(sources("llama"), tmp_path / "straight", "awq")


def test_the_flag(sources, tmp_path, monkeypatch):
    """On the command line: killed, then resumed, every file is that of a run that never stopped."""
    flags = ["--method", "gptq", "--group-size", 32, "--num-samples", 4, "--seqlen", 32, "--eval-windows", 1]
    source, output = sources("llama"), tmp_path / "out"
    assert run_quantize(source, *flags, "-o", tmp_path / "straight" / "out").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("lowbit.commands.quantize._block_printer", lambda console, total: kill_with_a_signal)
        interrupted = run_quantize(source, *flags, "-o", output)
    assert interrupted.code == 130
    assert "see --resume" in interrupted.err
    assert names(tmp_path) == [".out.journal", "straight"]
    done = run_quantize(source, *flags, "--resume", "-o", output)
    assert done.code == 0, done.err
    assert "1 blocks were finished before" in done.out
    assert names(tmp_path) == ["out", "straight"]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "straight" / "out").iterdir()
    }


def kill_with_a_signal(report: BlockReport) -> None:
    raise KeyboardInterrupt
