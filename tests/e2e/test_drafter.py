"""`quantize --drafter`: a head is tuned on the text of the checkpoint, its figures are in the report, and a head of
another model is refused before anything is quantized."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import lowbit
from benchmarks.train_drafter import config_for, write_head
from lowbit.commands.quantize import quantize
from lowbit.engine.drafts.training import Eagle3
from tests.builders import make_model, save

SMALL = {"TEXTS": 48, "HELD_OUT": 4, "PROMPT": 12, "NEW": 24, "RATE": 3e-3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a model and a drafter."""
    directory = tmp_path_factory.mktemp("made")
    model = make_model("llama", num_hidden_layers=8)
    save(model, directory / "model")
    config = config_for(model.config.to_dict(), 260)
    torch.manual_seed(0)
    head = Eagle3(config, model.get_input_embeddings().weight.detach())
    write_head(head, config, torch.arange(260), directory / "drafter")
    return directory


def run(made, output, *more):
    options = ["--method", "rtn", "--eval-windows", "0", "--device", "cpu", "--output", output, *more]
    return CliRunner().invoke(quantize, [str(made / "model"), *map(str, options)])


def test_a_drafter_is_tuned_on_the_results_own_text(made, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(f"lowbit.api.drafting.{name}", value)
    done = run(made, tmp_path / "out", "--drafter", made / "drafter", "--drafter-steps", 60)
    assert done.exit_code == 0, done.output
    told = re.search(r"drafts +(\d\.\d+) tokens a step, (\d\.\d+) before tuning", done.output)
    assert told is not None, done.output
    after, before = map(float, told.groups())
    assert after > before >= 1
    [row] = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()]
    assert (row["evaluation"], row["drafter"], row["steps"]) == ("drafts", "drafter", 60)
    assert (row["tokens_per_step"], row["baseline"]["tokens_per_step"]) == (
        pytest.approx(after, abs=1e-3),
        pytest.approx(before, abs=1e-3),
    )
    assert f"tuned for this checkpoint in 60 steps: {after:.3g} tokens" in (tmp_path / "out" / "README.md").read_text()
    old, new = (load_file(place / "model.safetensors") for place in (made / "drafter", tmp_path / "out-drafter"))
    assert {name: (value.dtype, value.shape) for name, value in old.items()} == {
        name: (value.dtype, value.shape) for name, value in new.items()
    }
    for name in (".", "model.safetensors"):
        assert (tmp_path / "out-drafter" / name).stat().st_mode == (tmp_path / "out" / name).stat().st_mode
    assert torch.equal(old["d2t"], new["d2t"])
    assert not torch.equal(old["fc.weight"], new["fc.weight"])
    plain = lowbit.load(tmp_path / "out", device="cpu", context=64)
    drafted = lowbit.load(tmp_path / "out", device="cpu", context=64, drafter=tmp_path / "out-drafter")
    texts = [model.generate([[5, 6, 7]], max_new_tokens=20, ignore_eos=True)[0].tokens for model in (plain, drafted)]
    assert texts[0] == texts[1]


def test_a_drafter_that_is_no_better_is_not_written(made, tmp_path, monkeypatch):
    for name, value in (SMALL | {"RATE": 0.0, "TEXTS": 4}).items():
        monkeypatch.setattr(f"lowbit.api.drafting.{name}", value)
    done = run(made, tmp_path / "out", "--drafter", made / "drafter", "--drafter-steps", 1)
    assert done.exit_code == 0, done.output
    assert "not written: use the drafter as it is" in re.sub(r"\s+", " ", done.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "the drafter's vocabulary is 300, that of the model 260: it was made for another"),
        ({"target_hidden_size": 96}, "hidden size of its model is 96, that of the model 64"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "its rope is 'yarn'; 'default' is trained"),
        ({"architectures": ["DFlashDraftModel"]}, "it is no EAGLE-3 head"),
    ],
)
def test_a_drafter_of_another_model_is_refused_before_anything_is_done(made, tmp_path, change, message):
    config = json.loads((made / "drafter" / "config.json").read_text()) | change
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "model.safetensors").hardlink_to(made / "drafter" / "model.safetensors")
    done = run(made, tmp_path / "out", "--drafter", tmp_path / "other")
    assert message in str(done.exception), (done.exception, done.output)
    assert not (tmp_path / "out").exists()


def test_options_that_contradict_each_other_are_refused(made, tmp_path):
    assert "name one with --drafter" in run(made, tmp_path / "out", "--drafter-steps", 5).output
    assert "is to be one file" in run(made, tmp_path / "o.gguf", "--drafter", made / "drafter").output
