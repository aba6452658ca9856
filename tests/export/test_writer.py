"""export/writer.py: shards that other readers accept, and directories that are complete or absent."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import CheckpointError, Unfinished
from lowbit.export import writer as writer_module
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.sharded import INDEX_NAME, ShardedWriter
from lowbit.export.staging import exchange, only_run, refuse_output, require_space, staged
from lowbit.export.writer import copy_companions

TENSORS = {f"t{i}": torch.full((25,), float(i)) for i in range(5)}  # 100 bytes each


def written(directory: Path, limit: int) -> list[str]:
    writer = ShardedWriter(directory, limit)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish({"model_type": "llama"})
    config = directory / "config.json.unfinished"
    assert json.loads(config.read_text()) == {"model_type": "llama"}
    config.unlink()
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
    wanted += ["tokenizer.model.v3", "vocab.bpe", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja"]
    unwanted = ["config.json", INDEX_NAME, "model.safetensors", "SHA256SUMS", "modeling_x.py", "pytorch_model.bin"]
    unwanted += ["README.md", "pytorch_model.bin.index.json", "optimizer.pt", "requirements.txt", "model.gguf"]
    unwanted += ["figures/loss.json", "loss.png", ".gitattributes", "recipe.toml", "report.html", "training.bin"]
    for name in wanted + unwanted:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    assert sorted(copy_companions(source, target, with_code=False)) == sorted(wanted)
    files = (path for path in target.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(target)) for path in files) == sorted(wanted)
    assert "modeling_x.py" in copy_companions(source, target, with_code=True)


def test_a_companion_that_is_too_large_is_left(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for size, name in ((100_000_000, "a.json"), (100_000_001, "b.json")):
        with (source / name).open("wb") as file:
            file.truncate(size)  # takes no room
    assert copy_companions(source, target, with_code=False) == ["a.json"]


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


def fill_and_fail(output: Path, failure: BaseException | None, overwrite: bool = False) -> None:
    with staged(output, overwrite) as staging:
        (staging / "new").write_text("x")
        if failure is not None:
            raise failure


def fill_alone(output: Path, content: str, overwrite: bool = False, meanwhile: str | None = None) -> None:
    with staged(output, overwrite, alone="head") as staging:
        (staging / "head").write_text(content)
        (staging / "other").write_text("not wanted")
        if meanwhile is not None:
            output.write_text(meanwhile)


def test_a_file_alone_is_published(tmp_path):
    output = tmp_path / "out.gguf"
    fill_alone(output, "first")
    assert (names(tmp_path), output.read_text()) == (["out.gguf"], "first")
    with pytest.raises(CheckpointError, match=r"exists; pass --overwrite"):
        fill_alone(output, "second")
    fill_alone(output, "second", overwrite=True)
    assert (names(tmp_path), output.read_text()) == (["out.gguf"], "second")


def test_a_file_that_turns_up_during_the_run_is_kept(tmp_path):
    output = tmp_path / "out.gguf"
    with pytest.raises(Unfinished, match="something was put there") as caught:
        fill_alone(output, "ours", meanwhile="theirs")
    assert output.read_text() == "theirs"
    kept = Path(str(caught.value).rpartition(" is in ")[2])
    assert kept.read_text() == "ours"


def test_a_file_system_without_links_takes_a_file_too(tmp_path, monkeypatch):
    def refused(*_paths: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("lowbit.export.staging.os.link", refused)
    fill_alone(tmp_path / "out.gguf", "first")
    assert (names(tmp_path), (tmp_path / "out.gguf").read_text()) == (["out.gguf"], "first")


def test_a_directory_cannot_become_a_file(tmp_path):
    (tmp_path / "out.gguf").mkdir()
    with pytest.raises(CheckpointError, match="no file, and cannot become one"):
        fill_alone(tmp_path / "out.gguf", "x", overwrite=True)


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


@pytest.fixture
def no_exchange(monkeypatch) -> None:
    """A file system that cannot swap two names in one step."""
    monkeypatch.setattr("lowbit.export.staging.exchange", lambda one, other: False)


def test_a_rename_that_fails_puts_the_old_back(tmp_path, monkeypatch, no_exchange):
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


@pytest.mark.parametrize("old", [[], ["old"], None])
def test_a_link_as_output_stays_and_what_it_leads_to_is_the_result(tmp_path, old):
    """Another disk is often named this way: the result must be complete, and on that disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if old is not None:
        (disk / "real").mkdir()
    for name in old or ():
        (disk / "real" / name).write_text("x")
    (tmp_path / "out").symlink_to(disk / "real")
    with staged(tmp_path / "out", overwrite=True) as staging:
        assert staging.parent == disk
        (staging / "a").write_text("x")
    assert (tmp_path / "out").readlink() == disk / "real"
    assert names(disk / "real") == ["a"]
    assert names(tmp_path) == ["disk", "out"]
    assert names(disk) == ["real"]


def test_what_turns_up_at_the_output_stays_and_the_result_too(tmp_path):
    with pytest.raises(Unfinished, match="something was put there during the run"):
        publish_over(tmp_path / "out", lambda output: (output / "mine").write_text("precious"))
    [aside] = tmp_path.glob(".out.result-*")
    assert names(aside) == ["new"]
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert names(tmp_path) == [aside.name, "out"]


def publish_over(output: Path, put: Callable[[Path], object]) -> None:
    with staged(output, overwrite=False) as staging:
        (staging / "new").write_text("x")
        output.mkdir()
        put(output)


@pytest.mark.parametrize("name", ["*", "[a-z]*", "out?"])
def test_a_name_is_no_pattern(tmp_path, name):
    """Another run's staging directory is kept, for any output name."""
    others = [".other.partial-abcdefgh", ".outs.partial-abcdefgh"]
    for other in others:
        (tmp_path / other).mkdir()
    with staged(tmp_path / name, overwrite=False):
        pass
    assert names(tmp_path) == sorted([*others, name])


def test_another_runs_directory_is_not_taken_for_ones_own(tmp_path):
    with staged(tmp_path / "a.partial-bcdefgh", overwrite=False) as theirs, staged(tmp_path / "a", overwrite=False):
        assert theirs.is_dir()


@pytest.mark.parametrize("stage", ["moved", "placed"])
def test_a_run_killed_between_two_renames_loses_nothing(tmp_path, no_exchange, stage):
    """On file systems without an atomic exchange, the next run repairs the half-done one."""
    output, old = tmp_path / "out", tmp_path / ".out.replaced-abcdefgh"
    old.mkdir()
    (old / "old").write_text("x")
    (tmp_path / ".out.partial-abcdefgh").mkdir()
    if stage == "placed":
        output.mkdir()
        (output / "new").write_text("x")
    with pytest.raises(CheckpointError, match="not empty; pass --overwrite"), staged(output, overwrite=False):
        pytest.fail("the block must not run")
    assert names(output) == (["old"] if stage == "moved" else ["new"])
    assert names(tmp_path) == ["out"]


def test_replacing_is_one_step_where_the_system_can(tmp_path, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot swap names")
    assert names(tmp_path / "one") == ["other"]
    assert names(tmp_path / "other") == ["one"]
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "one", tmp_path / "none")


def test_a_directory_that_takes_no_lock_is_not_called_taken():
    with pytest.raises(CheckpointError, match="/proc/self/out: cannot be written"), only_run(Path("/proc/self/out")):
        pass


def test_two_runs_do_not_write_one_output(tmp_path):
    """The second run is refused at once, before any work, and does not disturb the first."""
    code = "import sys, pathlib, lowbit.export.staging as s\nwith s.staged(pathlib.Path(sys.argv[1]), True): pass"
    with only_run(tmp_path / "out"), staged(tmp_path / "out", overwrite=False) as staging:
        (staging / "a").write_text("x")
        command = [sys.executable, "-c", code, str(tmp_path / "out")]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "out: another run is writing there; wait" in second.stderr
        assert names(staging) == ["a"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_a_lock_of_a_killed_run_holds_nobody_up(tmp_path):
    (tmp_path / ".out.lock").write_text("")
    with staged(tmp_path / "out", overwrite=False):
        pass
    assert names(tmp_path) == ["out"]


def test_an_interrupt_says_what_is_true(tmp_path, monkeypatch):
    """Before the rename nothing was written; after it the output is complete, and the message says so."""
    with pytest.raises(KeyboardInterrupt) as before:
        fill_and_fail(tmp_path / "out", KeyboardInterrupt())
    assert str(before.value) == ""
    monkeypatch.setattr("lowbit.export.staging.sync", interrupted_in(tmp_path))
    with pytest.raises(KeyboardInterrupt, match=r"out was written before that and is whole"):
        fill_and_fail(tmp_path / "out", None)
    assert names(tmp_path / "out") == ["new"]


def interrupted_in(parent: Path) -> Callable[[Path], None]:
    """A sync that a signal ends once it is the parent's turn: after the rename."""

    def sync(path: Path) -> None:
        if path == parent:
            raise KeyboardInterrupt

    return sync


def test_a_mount_point_is_refused_before_the_run(tmp_path):
    output = tmp_path / "a disk"
    output.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=10k", "lowbit-test", str(output)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(CheckpointError, match="a mount point, which cannot be replaced"):
            refuse_output(output, overwrite=True)
    finally:
        subprocess.run(["umount", str(output)], check=True)
    refuse_output(output, overwrite=True)


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
