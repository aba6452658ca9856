"""The Python API: values in, values out; the examples of its docstrings run."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.api.quantizing import BlockDone, Completed, Event, Planned, Quantized, Stage
from lowbit.errors import CheckpointError, RecipeError, UsageError
from tests.builders import save_family
from tests.house.tree import ROOT

FUNCTIONS = sorted(name for name in lowbit._PUBLIC if name[0].islower())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("source") / "llama", torch.bfloat16)


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model in it, as the examples have."""
    (tmp_path / "my-model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs(name: str, here: Path) -> None:
    function = getattr(lowbit, name)
    [test] = [test for test in doctest.DocTestFinder(recurse=False).find(function, name, globs={}) if test.examples]
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


def test_every_public_name_is_there_and_typed() -> None:
    for name, module in lowbit._PUBLIC.items():
        value = getattr(lowbit, name)
        assert value is getattr(importlib.import_module(module), name)
        if inspect.isfunction(value):
            assert set(inspect.signature(value).parameters) <= set(value.__annotations__)
    assert set(lowbit._PUBLIC) <= set(dir(lowbit))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        lowbit.quantise  # noqa: B018


def test_a_run_returns_what_it_did_and_tells_of_it(here: Path) -> None:
    told: list[Event] = []
    done = lowbit.quantize("my-model", "out", method="rtn", group_size=32, eval_windows=1, progress=told.append)
    assert isinstance(done, Quantized)
    assert done.output == Path("out")
    assert (here / "out" / "model.safetensors").exists()
    assert done.recipe.group_size == 32
    assert len(done.blocks) == sum(isinstance(event, BlockDone) for event in told) == 2
    kinds = [type(event) for event in told]
    assert kinds[:2] == [Completed, Planned]
    assert kinds.index(Stage) < kinds.index(BlockDone)
    before, after = done.scores
    assert before.nll < after.nll < before.nll + 1
    assert done.output_bytes < done.source_bytes


def test_a_recipe_is_a_value_a_mapping_or_a_file(here: Path) -> None:
    recipe = lowbit.quantize("my-model", dry_run=True, method="rtn", bits=8, group_size=32).recipe
    (here / "recipe.toml").write_text(recipe.to_toml())
    for form in (recipe, {"method": "rtn", "bits": 8, "group_size": 32}, here / "recipe.toml", "recipe.toml"):
        found = lowbit.quantize("my-model", recipe=form, dry_run=True)
        assert (found.recipe, found.output) == (recipe, None)
    assert lowbit.quantize("my-model", recipe=recipe, bits=4, dry_run=True).recipe.bits == 4


def test_bad_arguments_are_told_from_bad_files(here: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'group_size'"):
        lowbit.quantize("my-model", "out", group_sise=32)
    with pytest.raises(UsageError, match="say where to write"):
        lowbit.quantize("my-model")
    with pytest.raises(UsageError, match="eval_windows is -1"):
        lowbit.quantize("my-model", "out", eval_windows=-1)
    with pytest.raises(UsageError, match="0 windows: at least 1 is needed"):
        lowbit.perplexity("my-model", windows=0, keep=False)
    with pytest.raises(UsageError, match="did you mean 'ppl'"):
        lowbit.quantize("my-model", "out", measures=("pll",))
    with pytest.raises(CheckpointError):
        lowbit.quantize(here, "out")
    assert not (here / "out").exists()


def test_a_loaded_model_chats(here: Path) -> None:
    model = lowbit.load("my-model", device="cpu")
    messages = [{"role": "user", "content": "Hello"}]
    [wanted] = model.generate(model.encode_chat(messages), max_new_tokens=5)
    assert model.chat(messages, max_new_tokens=5).tokens == wanted.tokens


def test_the_readmes_lines_of_python_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    exec(block[1].replace('"demo"', '"my-model"'), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3
