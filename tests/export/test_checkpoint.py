"""export/checkpoint.py: directories without a model, wrong indices, wrong checksums."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint, verify_checksums, write_sums
from lowbit.export.sharded import INDEX_NAME


def model(directory: Path, shards: int = 1) -> Path:
    """A directory with config.json and `shards` files of a tensor each, t0, t1, ..."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        save_file({"t0": torch.zeros(2)}, directory / "model.safetensors")
        return directory
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.full((2,), float(i))}, directory / name)
    index(directory, {f"t{i}": name for i, name in enumerate(names)})
    return directory


def index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def weight_map(directory: Path) -> dict[str, str]:
    return json.loads((directory / INDEX_NAME).read_text())["weight_map"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_read(tmp_path, shards):
    checkpoint = open_checkpoint(model(tmp_path / "m", shards))
    assert list(checkpoint.entries) == [f"t{i}" for i in range(shards)]
    assert checkpoint.read(f"t{shards - 1}").tolist() == [shards - 1.0] * 2
    assert checkpoint.nbytes == 8 * shards
    assert checkpoint.quantization is None


def test_one_file_of_another_name_is_enough(tmp_path):
    model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch.safetensors")
    assert list(open_checkpoint(tmp_path).entries) == ["t0"]


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "missing"), ("{", "not JSON"), ("[1]", "JSON object is expected, not list")]
)
def test_a_configuration_that_is_none(tmp_path, text, message):
    model(tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        open_checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path):
    model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_never_loaded(tmp_path, name):
    model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"t": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"only pickled weights \({name}\).*safe_serialization"):
        open_checkpoint(tmp_path)


def test_several_files_without_an_index(tmp_path):
    model(tmp_path, 2)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"2 safetensors files but no {INDEX_NAME}"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_a_missing_shard(tmp_path):
    model(tmp_path, 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'model-00002-of-00002\.safetensors' is missing.*incomplete"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname", "..", "a/b.safetensors", "."])
def test_an_index_that_leads_outside(tmp_path, shard):
    directory = model(tmp_path / "m", 2)
    save_file({"t1": torch.zeros(2)}, tmp_path / "secret.safetensors")
    index(directory, weight_map(directory) | {"t1": shard})
    with pytest.raises(CheckpointError, match="lies outside the model directory"):
        open_checkpoint(directory)


def test_an_index_that_names_a_tensor_of_no_file(tmp_path):
    model(tmp_path, 2)
    index(tmp_path, weight_map(tmp_path) | {"t9": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"'t9' should be in model-00001.* and is nowhere"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_the_wrong_file(tmp_path):
    model(tmp_path, 2)
    index(
        tmp_path,
        weight_map(tmp_path) | {"t0": "model-00002-of-00002.safetensors", "t1": "model-00001-of-00002.safetensors"},
    )
    with pytest.raises(CheckpointError, match=r"'t0' should be in model-00002.* and is in model-00001"):
        open_checkpoint(tmp_path)


def test_one_file_beside_the_shards_of_an_index(tmp_path):
    """transformers reads model.safetensors, vLLM the shards, so the intended weights are unknown."""
    model(tmp_path, 2)
    save_file({"t0": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: transformers loads the first, vLLM"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert list(open_checkpoint(tmp_path).entries) == ["t0"]


@pytest.mark.parametrize(
    "wrong", [None, {}, [], "x", {"t0": 5}, {"t0": None}, {"t0": ["model-00001-of-00002.safetensors"]}]
)
def test_an_index_without_a_map(tmp_path, wrong):
    model(tmp_path, 2)
    index(tmp_path, wrong)
    with pytest.raises(CheckpointError, match="index"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    model(tmp_path, 2)
    save_file({"t0": torch.ones(2), "t1": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'t0' is both in"):
        open_checkpoint(tmp_path)


def test_sums_are_what_sha256sum_checks(tmp_path):
    model(tmp_path, 2)
    write_sums(tmp_path)
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 4
    assert verify_checksums(open_checkpoint(tmp_path)) == 2


def test_a_file_that_was_read_back_is_not_read_again(tmp_path):
    model(tmp_path, 2)
    known = "model-00001-of-00002.safetensors"
    write_sums(tmp_path, read={known: "0" * 64})
    assert f"{'0' * 64}  {known}\n" in (tmp_path / "SHA256SUMS").read_text()
    with pytest.raises(CheckpointError, match=known):
        write_sums(tmp_path, meant={known: "1" * 64}, read={known: "0" * 64})


def flip(path: Path, byte: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1
    path.write_bytes(raw)


def test_a_flipped_bit_is_noticed_where_sums_are_known(tmp_path):
    model(tmp_path, 2)
    write_sums(tmp_path)
    flip(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: SHA-256 is .*get it again"):
        verify_checksums(open_checkpoint(tmp_path))


def test_sums_of_the_binary_form_are_read(tmp_path):
    model(tmp_path)
    write_sums(tmp_path)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  ", " *").upper().replace("MODEL.SAFETENSORS", "model.safetensors"))
    assert verify_checksums(open_checkpoint(tmp_path)) == 1


def test_a_link_into_a_hub_cache_is_held_against_its_name(tmp_path):
    snapshot, blob = (tmp_path / "models--org--m" / part for part in ("snapshots/1f", f"blobs/{'0' * 64}"))
    for path in (snapshot, blob):
        path.parent.mkdir(parents=True)
    model(snapshot)
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    with pytest.raises(CheckpointError, match="SHA-256 is"):
        verify_checksums(open_checkpoint(snapshot))


@pytest.mark.parametrize("name", ["./model.safetensors", "x/../model.safetensors"])
def test_a_sum_counts_however_its_file_is_named(tmp_path, name):
    model(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="SHA-256 is"):
        verify_checksums(open_checkpoint(tmp_path))


@pytest.mark.parametrize("raw", [b"\xff" * 64 + b"  model.safetensors\n", b"abc  model.safetensors\n", b"0" * 64])
def test_sums_that_are_none_are_refused(tmp_path, raw):
    model(tmp_path)
    (tmp_path / "SHA256SUMS").write_bytes(raw)
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        verify_checksums(open_checkpoint(tmp_path))


def test_without_sums_nothing_is_claimed(tmp_path):
    assert verify_checksums(open_checkpoint(model(tmp_path))) == 0
