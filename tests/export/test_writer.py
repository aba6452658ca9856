"""export/writer.py: shards that other readers read, and directories that are whole or not there."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import CheckpointError
from lowbit.export import writer as writer_module
from lowbit.export.checkpoint import INDEX_NAME, open_checkpoint
from lowbit.export.staging import require_space, staged
from lowbit.export.writer import ShardedWriter, copy_companions

TENSORS = {f"t{i}": torch.full((25,), float(i)) for i in range(5)}  # 100 bytes each


def written(directory: Path, limit: int) -> list[str]:
    writer = ShardedWriter(directory, limit)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()
    return sorted(path.name for path in directory.iterdir())


def test_one_file_has_no_index(tmp_path):
    assert written(tmp_path, 500) == ["model.safetensors"]
    assert {name: t.tolist() for name, t in load_file(tmp_path / "model.safetensors").items()} == {
        name: t.tolist() for name, t in TENSORS.items()
    }


def test_shards_and_their_index(tmp_path):
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert written(tmp_path, 250) == [*shards, INDEX_NAME]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 500
    assert index["weight_map"] == dict(zip(TENSORS, [shards[0]] * 2 + [shards[1]] * 2 + [shards[2]], strict=True))
    for shard in shards:
        assert load_file(tmp_path / shard).keys() == {n for n, s in index["weight_map"].items() if s == shard}


@pytest.mark.parametrize("limit", [1, 99])
def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path, limit):
    assert len(written(tmp_path, limit)) == 6
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).read("t3").tolist() == [3.0] * 25


def test_a_shard_that_is_exactly_full(tmp_path):
    assert len(written(tmp_path, 200)) == 4


def test_companions_are_carried_and_code_is_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"]
    wanted += ["vocab.txt", "merges.txt", "tokenizer.model", "special_tokens_map.json", "NOTICE.md"]
    unwanted = ["config.json", INDEX_NAME, "model.safetensors", "SHA256SUMS", "modeling_x.py", "pytorch_model.bin"]
    unwanted += ["README.md", "pytorch_model.bin.index.json", "optimizer.pt", "requirements.txt"]
    for name in wanted + unwanted:
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    assert copy_companions(source, target, with_code=False) == sorted(wanted)
    assert sorted(path.name for path in target.iterdir()) == sorted(wanted)
    assert "modeling_x.py" in copy_companions(source, target, with_code=True)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_block_that_ends_well_is_published(tmp_path):
    output = tmp_path / "deep" / "out"
    with staged(output, overwrite=False) as staging:
        assert staging.parent == output.parent
        assert not output.exists()
        (staging / "a").write_text("x")
    assert names(tmp_path / "deep") == ["out"]
    assert names(output) == ["a"]
    assert output.stat().st_mode & 0o777 == 0o755


def fill_and_fail(output: Path, failure: BaseException, overwrite: bool = False) -> None:
    with staged(output, overwrite) as staging:
        (staging / "new").write_text("x")
        raise failure


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "x")])
def test_whatever_ends_the_block_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)):
        fill_and_fail(tmp_path / "out", failure)
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, code):
    with pytest.raises(CheckpointError, match="disk is full"):
        fill_and_fail(tmp_path / "out", OSError(code, "No space left on device"))
    assert names(tmp_path) == []


def test_an_output_that_is_not_empty_is_refused(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty; pass --overwrite"), staged(output, overwrite=False):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]
    assert names(output) == ["mine"]


def test_a_file_in_the_way_is_refused_even_to_overwrite(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(CheckpointError, match="a file is in the way"), staged(tmp_path / "out", overwrite=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "precious"


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", overwrite=False) as staging:
        (staging / "a").write_text("x")
    assert names(tmp_path / "out") == ["a"]


def test_overwriting_keeps_the_old_until_the_new_is_whole(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("x")
    with pytest.raises(ValueError, match="boom"):
        fill_and_fail(output, ValueError("boom"), overwrite=True)
    assert names(output) == ["old"]
    with staged(output, overwrite=True) as staging:
        (staging / "new").write_text("x")
        assert names(output) == ["old"]
    assert names(output) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_back(tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("x")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"), staged(output, overwrite=True) as staging:
        (staging / "new").write_text("x")
    assert names(output) == ["old"]
    assert names(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    stale = tmp_path / ".out.partial-abc123"
    stale.mkdir()
    (stale / "shard-00000").write_text("x")
    other = tmp_path / ".other.partial-abc123"
    other.mkdir()
    with staged(tmp_path / "out", overwrite=False):
        assert not stale.exists()
    assert names(tmp_path) == [".other.partial-abc123", "out"]


def test_a_link_as_output_is_followed_or_refused_but_its_target_is_kept(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "out").symlink_to(real)
    with staged(tmp_path / "out", overwrite=True) as staging:
        (staging / "a").write_text("x")
    assert names(tmp_path / "out") == ["a"]
    assert real.is_dir()


def test_a_relative_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged(Path("out"), overwrite=False) as staging:
        (staging / "a").write_text("x")
    assert names(tmp_path / "out") == ["a"]


def test_free_space_is_required_of_the_disk_that_the_output_is_on(tmp_path):
    require_space(tmp_path / "not" / "yet" / "there", 1)
    free = os.statvfs(tmp_path)
    with pytest.raises(CheckpointError, match=r"GB free, about .* GB needed"):
        require_space(tmp_path / "out", free.f_frsize * free.f_blocks * 2)


def test_json_ends_with_a_newline_and_keeps_letters(tmp_path):
    writer_module.write_json(tmp_path / "x.json", {"a": "é"})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "a": "é"\n}\n'.encode()
