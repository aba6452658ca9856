"""A format of another container is one class of each in one file: everything else follows from its row in FORMATS."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.errors import CheckpointError
from lowbit.evaluation.journal import Library
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.container import Container, Writer
from lowbit.export.dialects import FORMATS
from lowbit.export.files import identity_of
from lowbit.export.format import Format
from lowbit.export.formats import LogicalTensors
from lowbit.export.tensorfile import TensorEntry, raw_bytes
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import parse_scheme
from tests.builders import save_family

INT8 = parse_scheme("int8-channel")
PAPERS = ["README.md", "SHA256SUMS", "quantization_report.json", "recipe.toml"]


class OneFileWriter(Writer):
    """8 bytes of length, a JSON header, the data: tensors first, then the files that were carried along."""

    def __init__(self, head: Path) -> None:
        self.head, self.data = head, b""
        self.tensors: dict[str, Any] = {}

    def put(self, raw: bytes | memoryview) -> tuple[int, int]:
        self.data += bytes(raw)
        return len(self.data) - len(raw), len(self.data)

    def add(self, name: str, tensor: Tensor) -> None:
        place = self.put(raw_bytes(tensor.contiguous()))
        self.tensors[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), *place]

    def finish(self, config: Mapping[str, Any]) -> None:
        files = {}
        for path in sorted(self.head.parent.iterdir()):
            if path.suffix in (".json", ".jinja") and path.name not in PAPERS:
                files[path.name] = self.put(path.read_bytes())
                path.unlink()
        header = json.dumps({"config": config, "tensors": self.tensors, "files": files}).encode()
        self.head.write_bytes(len(header).to_bytes(8, "little") + header + self.data)


class OneFile(Container):
    head = "model.toy"
    weights = ("*.toy",)

    def parts(self, head: Path) -> tuple[dict[str, Any], int]:
        """The header, and the byte at which the data begins."""
        raw = head.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        return json.loads(raw[8:start]), start

    def read(self, directory: Path, head: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        header, start = self.parts(head)
        identity = identity_of(head.stat())
        entries = {
            name: TensorEntry(name, head, getattr(torch, dtype), tuple(shape), start + begin, end - begin, identity)
            for name, (dtype, shape, begin, end) in header["tensors"].items()
        }
        return header["config"], entries

    def writer(self, directory: Path, max_shard_bytes: int) -> Writer:
        return OneFileWriter(self.head_in(directory, finished=False))

    @contextmanager
    def companions(self, directory: Path) -> Iterator[Path]:
        header, start = self.parts(self.head_in(directory))
        raw = self.head_in(directory).read_bytes()[start:]
        with tempfile.TemporaryDirectory() as place:
            for name, (begin, end) in header["files"].items():
                Path(place, Path(name).name).write_bytes(raw[begin:end])
            yield Path(place)


class Toy(Format):
    """Rows of bytes (n, k + 2): a row's codes, then its scale."""

    name = method = "toy"
    package = "nobody's"
    suffixes = ("rows",)
    marker = "rows"
    loading = "lowbit alone loads it."
    uniform = True
    scale_dtype = torch.float16
    container = OneFile()

    def reason_against(self, scheme):
        return None if scheme == INT8 else "int8, a scale for each row"

    def reason_in(self, engine, scheme):
        return "not known there"

    def write(self, name, weight):
        return {f"{name}.rows": torch.cat([weight.codes.view(torch.uint8), weight.scales.view(torch.uint8)], 1)}

    def read(self, name, tensor, scheme):
        rows = tensor(f"{name}.rows")
        scales = rows[:, -2:].contiguous().view(torch.float16)
        return QTensor(rows[:, :-2].contiguous().view(torch.int8), scales, None, scheme)

    def shape(self, name, shapes, tensor, scheme):
        n, width = shapes(f"{name}.rows")
        return n, width - 2

    def quantization_config(self, schemes, unquantized):
        return {"quant_method": "toy"}

    def schemes_of(self, config, names):
        return dict.fromkeys(names, INT8)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """One model in the toy format, and in compressed-tensors: the same codes and scales."""
    place = tmp_path_factory.mktemp("container")
    save_family("llama", place / "model", torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, "toy", Toy())
        for fmt in ("toy", "compressed-tensors"):
            lowbit.quantize(place / "model", place / fmt, method="int8", format=fmt, device="cpu", eval_windows=0)
        yield place / "toy", place / "compressed-tensors"


@pytest.fixture
def spoilt(both: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the toy checkpoint to change."""
    return shutil.copytree(both[0], tmp_path / "copy")


def test_all_is_in_the_one_file_and_reads_as_the_same_model(both: tuple[Path, Path]) -> None:
    one = both[0]
    assert names_in(one) == sorted([*PAPERS, "model.toy"])
    logical, other = (LogicalTensors(open_checkpoint(directory)) for directory in both)
    assert logical.format is FORMATS["toy"]
    assert len(logical.schemes) == 14
    for name in sorted(other.names):
        assert torch.equal(logical.read(name), other.read(name)), name
    texts = [lowbit.load(each, device="cpu").generate(["Once"], max_new_tokens=8)[0] for each in both]
    assert len(texts[0].tokens) == 8
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].text == texts[1].text


def test_it_is_inspected(both: tuple[Path, Path]) -> None:
    found = lowbit.inspect(both[0], check=True)
    assert (found.format, len(found.linears), found.checked_files) == ("toy", 14, 1)
    q = found.linears["model.layers.0.self_attn.q_proj"]
    assert (q.n, q.k, q.nbytes) == (64, 64, 64 * 66)
    assert found.refusals["Hopper, sm_90"]["vLLM"]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def same_tensors(one: Path, other: Path) -> None:
    found, wanted = (open_checkpoint(directory) for directory in (one, other))
    assert sorted(found.entries) == sorted(wanted.entries)
    assert found.config == wanted.config
    for name in found.entries:
        assert torch.equal(found.read(name), wanted.read(name)), name


def test_it_is_converted_both_ways_to_the_bit(both: tuple[Path, Path], tmp_path: Path) -> None:
    one, several = both
    assert lowbit.convert(one, tmp_path / "there", format="compressed-tensors").conversion.exact == 14
    names = sorted(path.name for path in several.iterdir())
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        name for name in names if name != "recipe.toml"
    ]
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (several / name).read_bytes(), name
    same_tensors(tmp_path / "there", several)
    lowbit.convert(several, tmp_path / "back", format="toy")
    assert names_in(tmp_path / "back") == sorted([*PAPERS[:-1], "model.toy"])
    same_tensors(tmp_path / "back", one)


def test_it_is_a_checkpoint_under_its_own_name_alone(spoilt: Path) -> None:
    (spoilt / "model.toy").rename(spoilt / "model.toy.unfinished")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_checkpoint(spoilt)
    assert open_checkpoint(spoilt, finished=False).head == spoilt / "model.toy.unfinished"


def test_its_bytes_decide_what_was_measured_of_it(spoilt: Path, tmp_path: Path) -> None:
    library, file = Library(tmp_path), spoilt / "model.toy"
    before = library.fingerprint(spoilt)
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(bytes(changed))
    assert library.fingerprint(spoilt) != before
    with pytest.raises(CheckpointError, match="the file changed or is damaged"):
        lowbit.inspect(spoilt, check=True)


def test_one_that_git_did_not_fetch_is_told_so(spoilt: Path) -> None:
    (spoilt / "model.toy").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"model\.toy: a Git LFS pointer"):
        open_checkpoint(spoilt)
