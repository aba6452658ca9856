"""calibrate/own.py: the model's own text is its own draws, kept for a run that goes on, and spread among the others."""

import json

import pytest
import torch

import lowbit
from lowbit.calibrate.own import kept_own_text, own_text, prompts_of
from lowbit.errors import RecipeError
from lowbit.models.source import open_source
from tests.builders import calibration, save_family


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return open_source(str(save_family("llama", tmp_path / "source")))


def test_draws_follow_the_seed(source):
    ids = own_text(source, "cpu", torch.bfloat16, (16, 24), 3)
    assert ids.shape == (16, 24)
    assert set(ids.flatten().tolist()) <= set(range(source.vocabulary))
    assert len(set(ids[:, 0].tolist())) > 8
    assert torch.equal(ids, own_text(source, "cpu", torch.bfloat16, (16, 24), 3))
    assert not torch.equal(ids, own_text(source, "cpu", torch.bfloat16, (16, 24), 4))


def test_windows_longer_than_a_piece_hold_several(source, monkeypatch):
    monkeypatch.setattr("lowbit.calibrate.own.PIECE", 8)
    assert own_text(source, "cpu", torch.float32, (3, 20), 3).shape == (3, 20)


@pytest.mark.parametrize("windows", [4, 5])
def test_every_second_text_begins_with_the_dataset(source, windows):
    dataset = calibration(6, 24).ids
    prompts = prompts_of(dataset, windows, 5, 3)
    runs = {tuple(piece) for row in dataset.unfold(1, 5, 1).tolist() for piece in row}
    assert {tuple(row) for row in prompts.tolist()} <= runs
    ids = own_text(source, "cpu", torch.float32, (windows, 12), 3, prompts)
    begun = [tuple(row) in {tuple(prompt) for prompt in prompts.tolist()} for row in ids[:, :5].tolist()]
    assert begun == [bool(place % 2) for place in range(windows)]


def test_prompts_change_the_text_that_is_kept(source):
    prompts = prompts_of(calibration(6, 24).ids, 4, 5, 3)
    kept = [kept_own_text(source, "cpu", torch.float32, (4, 16), 1, {"m": "a"}, each) for each in (None, prompts)]
    assert not torch.equal(*kept)
    assert prompts_of(calibration(6, 24).ids, 4, 0, 3) is None


def test_a_run_that_goes_on_finds_the_same_text(source, tmp_path, monkeypatch):
    made = kept_own_text(source, "cpu", torch.float32, (4, 16), 1, {"model.safetensors": "a"})
    monkeypatch.setattr("lowbit.calibrate.own.own_text", lambda *_: torch.zeros(4, 16, dtype=torch.int64))
    assert torch.equal(kept_own_text(source, "cpu", torch.float32, (4, 16), 1, {"model.safetensors": "a"}), made)
    assert not kept_own_text(source, "cpu", torch.float32, (4, 16), 1, {"model.safetensors": "b"}).any()
    (tmp_path / "cache" / "own").mkdir(exist_ok=True)
    for file in (tmp_path / "cache" / "own").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert not kept_own_text(source, "cpu", torch.float32, (4, 16), 1, {"model.safetensors": "a"}).any()


def test_own_windows_are_spread_among_the_others():
    given = calibration(4, 8)
    both = given.with_own(torch.full((2, 8), 7))
    assert (both.ids == 7).all(1).tolist() == [False, True, False, False, True, False]
    assert both.sha256 != given.sha256
    assert "2 windows of the model's own text" in both.source
    more = given.with_own(torch.full((2, 8), 7), torch.full((3, 8), 9))
    assert torch.equal(more.ids, both.ids)
    assert more.sha256 != both.sha256
    assert more.source.endswith("2 windows of the model's own text, 3 for tuning alone")


def test_a_run_calibrates_on_both(source, tmp_path):
    settings = {"method": "gptq", "group_size": 32, "num_samples": 4, "seqlen": 32, "eval_windows": 0}
    alone = lowbit.quantize(source.directory, tmp_path / "alone", **settings)
    both = lowbit.quantize(source.directory, tmp_path / "both", own_samples=4, **settings)
    assert alone.recipe.calibration_sha256 != both.recipe.calibration_sha256
    begun = lowbit.quantize(source.directory, tmp_path / "begun", own_samples=4, own_prompt=8, **settings)
    assert begun.recipe.calibration_sha256 != both.recipe.calibration_sha256
    with pytest.raises(RecipeError, match="own_samples is -1"):
        lowbit.quantize(source.directory, tmp_path / "none", own_samples=-1, **settings)


def test_tuning_alone_may_read_more_of_it(source, tmp_path):
    settings = {"method": "best", "group_size": 32, "num_samples": 4, "seqlen": 32, "iters": 1, "distill_steps": 2}
    settings |= {"eval_windows": 0}
    runs = {
        count: lowbit.quantize(source.directory, tmp_path / str(count), distill_samples=count, **settings)
        for count in (0, 4)
    }
    assert runs[0].recipe.calibration_sha256 != runs[4].recipe.calibration_sha256
    with pytest.raises(RecipeError, match="distill_samples is -1"):
        lowbit.quantize(source.directory, tmp_path / "none", **settings | {"distill_samples": -1})
    with pytest.raises(RecipeError, match="windows for tuning: add --distill-steps"):
        lowbit.quantize(source.directory, tmp_path / "none", method="gptq", distill_samples=4)


def test_the_finest_method_tunes_codes_on_own_text(source, tmp_path):
    few = {"num_samples": 4, "own_samples": 4, "seqlen": 32, "anneal_steps": 2, "distill_steps": 3, "eval_windows": 0}
    done = lowbit.quantize(source.directory, tmp_path / "out", method="finest", group_size=32, **few)
    assert done.recipe.distill_codes
    assert done.recipe.rounder == "anneal"
    assert done.recipe.own_samples == 4
    assert len(json.loads((tmp_path / "out" / "quantization_report.json").read_text())["distilled"]) == 3
