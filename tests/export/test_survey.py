"""export/survey.py: one pass over a checkpoint's weights finds bad values, wrong sums and files that change."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError, Unfinished
from lowbit.export import survey as module
from lowbit.export.checkpoint import Checkpoint, open_checkpoint
from lowbit.export.sharded import INDEX_NAME
from lowbit.export.survey import count_broken, survey


def checkpoint(directory: Path, *shards: dict[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint with these tensors, a file for each dict."""
    (directory / "config.json").write_text('{"model_type": "llama"}')
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, directory / name)
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return open_checkpoint(directory)


def sound() -> list[dict[str, torch.Tensor]]:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int32, torch.bool)
    tensors = {f"t{i}": torch.arange(60).reshape(6, 10).to(dtype) for i, dtype in enumerate(kinds)}
    return [tensors | {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5)}, {"last": torch.ones(3)}]


def test_sums_are_those_of_the_files_and_every_byte_of_data_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 64)
    found = checkpoint(tmp_path, *sound())
    told: list[int] = []
    sums = survey(found, told.append)
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.safetensors")}
    assert sum(told) == found.nbytes


@pytest.mark.parametrize("piece", [64, 1 << 24])
@pytest.mark.parametrize("name", ["t0", "t1", "t2", "t3", "t4", "last", "scalar"])
def test_bad_values_are_counted_wherever_they_stand(tmp_path, monkeypatch, piece, name):
    monkeypatch.setattr(module, "PIECE", piece)
    shards = sound()
    for tensors in shards:
        if name in tensors:
            flat = tensors[name].view(-1)
            flat[0] = float("nan")
            flat[-1] = float("nan")
            count, numel = len({0, flat.numel() - 1}), flat.numel()
    with pytest.raises(CheckpointError, match=f"^{name}: {count} of {numel} values are NaN or infinite"):
        survey(checkpoint(tmp_path, *shards))


def test_a_wrong_sum_is_said_before_bad_values(tmp_path):
    found = checkpoint(tmp_path, {"t": torch.full((4,), float("nan"))})
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  model-00001-of-00001.safetensors\n")
    with pytest.raises(CheckpointError, match="was recorded"):
        survey(found)


def test_a_file_that_is_replaced_after_it_was_opened(tmp_path):
    found = checkpoint(tmp_path, {"t": torch.zeros(4)})
    save_file({"t": torch.ones(4)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(Unfinished):
        survey(found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_quick_look_misses_none(monkeypatch, bad, dtype):
    monkeypatch.setattr(module, "PIECE", 32)
    value = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert count_broken(value) == 0
    value[3, 4] = value[6, 10] = bad
    assert count_broken(value) == 2
