"""export/files.py: only the model's own files are read, and nothing is written through an existing name."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError, Unfinished
from lowbit.evaluation.record import FILE, record
from lowbit.export.checkpoint import open_checkpoint, require_same_source, sha256_of
from lowbit.export.files import create, read_bytes, read_text, replacing, survey, write_text
from lowbit.export.writer import copy_companions

SECRET = "the secret"


@pytest.fixture
def model(tmp_path) -> Path:
    """A directory with a configuration, two files of weights in one and a licence."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "LICENSE").write_text("free")
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


@pytest.mark.parametrize("name", ["notes.txt", "LICENSE", "README.md", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("hops", [1, 2])
def test_a_link_to_somewhere_else_is_refused(model, secret, tmp_path, name, hops):
    (model / name).unlink(missing_ok=True)
    if hops == 2:
        (tmp_path / "hop").symlink_to(secret)
    (model / name).symlink_to(secret if hops == 1 else tmp_path / "hop")
    with pytest.raises(CheckpointError, match=rf"{name}: a link to .*secret.txt, outside the model directory"):
        open_checkpoint(model)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="outside the model directory"):
        copy_companions(model, tmp_path / "out", with_code=False)


@pytest.mark.parametrize("target", ["/proc/self/environ", "/dev/zero", "/etc"])
def test_links_into_the_system_are_refused(model, target):
    (model / "notes.txt").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link to"):
        open_checkpoint(model)


def test_a_directory_of_templates_is_looked_into(model, secret):
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool.jinja").write_text("x")
    assert "additional_chat_templates/tool.jinja" in survey(model)
    (folder / "rag.jinja").symlink_to(secret)
    with pytest.raises(CheckpointError, match="outside the model directory"):
        survey(model)


def test_links_within_the_model_are_read(model, tmp_path):
    (model / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "out").mkdir()
    assert copy_companions(model, tmp_path / "out", with_code=False) == ["LICENSE", "NOTICE"]
    assert not (tmp_path / "out" / "NOTICE").is_symlink()


def cached(model: Path, repository: Path) -> Path:
    """A snapshot in a hub cache with the files of `model`: links into the repository's store."""
    snapshot, store = repository / "snapshots" / "0123abcd", repository / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    store.mkdir()
    for path in model.iterdir():
        path.rename(store / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (store / "t").write_text("x")
    (snapshot / "additional_chat_templates" / "tool.jinja").symlink_to("../../../blobs/t")
    return snapshot


def test_a_snapshot_reads_the_store_of_its_own_repository_alone(model, secret, tmp_path):
    """Another repository of the same cache may be private, and a link to it would publish its files."""
    snapshot = cached(model, tmp_path / "hub" / "models--org--name")
    (tmp_path / "out").mkdir()
    assert open_checkpoint(snapshot).read("a").tolist() == [1.0] * 4
    assert copy_companions(snapshot, tmp_path / "out", with_code=False) == [
        "LICENSE",
        "additional_chat_templates/tool.jinja",
    ]
    other = tmp_path / "hub" / "models--org--private" / "blobs" / "3c5a"
    other.parent.mkdir(parents=True)
    other.write_text(SECRET)
    for target in (other, secret):
        (snapshot / "notes.txt").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"notes\.txt: a link to .*, outside the model directory"):
            open_checkpoint(snapshot)
        (snapshot / "notes.txt").unlink()


def test_a_directory_elsewhere_reads_no_store(model, tmp_path):
    """It may come from anywhere, and names the store of a cache that it is no part of."""
    snapshot = cached(model, tmp_path / "hub" / "models--org--name")
    (model / "config.json").symlink_to(snapshot / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: a link to .*blobs/config\.json, outside"):
        open_checkpoint(model)


def test_a_model_that_is_named_by_a_link(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    assert open_checkpoint(tmp_path / "link").read("b").tolist() == [1.0] * 2


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has a hundred characters at most
        made.bind(path.name)
        os.chdir(before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "notes.txt"])
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a pipe"), (make_socket, "a socket")])
def test_what_is_no_file_is_refused_at_once(model, name, make: Callable[[Path], None], kind):
    (model / name).unlink(missing_ok=True)
    make(model / name)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=f"{name}: {kind}, where a file is expected"):
        open_checkpoint(model)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("name", [f"a\n{'0' * 64}  model.safetensors", "\x1b[2J.txt", "\udcff.txt", "a\u2028.json"])
def test_a_name_that_cannot_be_said_is_refused(model, name):
    (model / name).write_text("{}")
    with pytest.raises(CheckpointError, match="a name with line ends, control characters or broken UTF-8; rename it"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_in_a_files_place_is_refused(model, name):
    (model / name).unlink()
    (model / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: a directory, where a file is expected"):
        open_checkpoint(model)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(CheckpointError, match="5 bytes, where 4 at most are expected"):
        read_bytes(tmp_path / "x", 4)


def test_text_that_is_none(tmp_path):
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match="not UTF-8 text \\(byte 2\\)"):
        read_text(tmp_path / "x")


def test_writing_replaces_a_link_and_leaves_its_target(secret, tmp_path):
    path = tmp_path / "report.html"
    path.symlink_to(secret)
    write_text(path, "new")
    assert (path.read_text(), path.is_symlink(), secret.read_text()) == ("new", False, SECRET)


def test_a_new_file_is_never_opened_through_a_link(secret, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(secret)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("model.safetensors", "dangling"):
        with pytest.raises(FileExistsError):
            create(tmp_path / name)
    assert secret.read_text() == SECRET
    assert not (tmp_path / "nowhere").exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x").write_text("old")

    def write() -> None:
        with replacing(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_recording_follows_no_planted_link(model, secret):
    """The predictable names are links out of the checkpoint; a measurement is still recorded safely."""
    for name in (f".{FILE}.partial", ".SHA256SUMS.partial", FILE):
        (model / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{FILE}: a link to"):
        open_checkpoint(model)
    (model / FILE).unlink()
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')  # else nothing is recorded
    record(model, [{"evaluation": "perplexity", "perplexity": 3.0}])
    assert secret.read_text() == SECRET
    assert (model / FILE).read_text() == '{"evaluation": "perplexity", "perplexity": 3.0}\n'


def rewrite(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def rewrite_and_hide(path: Path) -> None:
    """Size and modification time are the same; only the change time differs."""
    before = path.stat()
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, rewrite_and_hide, replace_file])
def test_weights_that_change_after_they_were_opened_are_not_read(model, change):
    checkpoint = open_checkpoint(model)
    change(model / "model.safetensors")
    with pytest.raises(Unfinished, match=r"model\.safetensors: changed while it was read"):
        checkpoint.read("a")


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "model.safetensors"])
@pytest.mark.parametrize("change", [rewrite, rewrite_and_hide, replace_file, Path.unlink])
def test_a_source_that_changed_is_noticed_at_the_end(model, name, change):
    checkpoint = open_checkpoint(model)
    require_same_source(checkpoint, {})
    change(model / name)
    with pytest.raises(Unfinished, match=f"{name}: changed while it was read"):
        require_same_source(checkpoint, {})


def test_a_file_that_was_only_linked_elsewhere_is_the_same_where_its_hash_is_known(model):
    checkpoint = open_checkpoint(model)
    sums = {name: sha256_of(model / name) for name in ("config.json", "model.safetensors")}
    for name in sums:
        os.link(model / name, model.parent / name)
    require_same_source(checkpoint, sums)
    rewrite(model / "model.safetensors")
    with pytest.raises(Unfinished, match=r"model\.safetensors"):
        require_same_source(checkpoint, sums)
