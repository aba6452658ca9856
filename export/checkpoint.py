"""A checkpoint directory: its configuration and its tensors, checked before they are believed."""

import hashlib
import posixpath
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lowbit.errors import CheckpointError, Unfinished
from lowbit.export.dialects import SIDECARS
from lowbit.export.files import Identity, changed, is_same, open_regular, read_bytes, read_text, survey, write_text
from lowbit.export.plain import read_json
from lowbit.export.sizes import require_sizes
from lowbit.export.tensorfile import TensorEntry, read_entries, read_tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUMS_NAME = "SHA256SUMS"
CONFIG_NAME = "config.json"
UNSEALED_CONFIG = "config.json.unfinished"  # what it is called until the directory is whole: no reader takes that
SUM_LINE = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(.+)")
ADAPTER_NAME = "adapter_config.json"  # peft's
LARGE_FILES = (".safetensors", ".json", ".model")  # what repositories keep in Git LFS
POINTER_BYTES = 1024  # more than such a line has
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors files with a config.json.

    directory  where it lies
    config     config.json as a dict
    entries    every tensor by name
    files      the identity of every file as it was opened, by name
    """

    directory: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    files: Mapping[str, Identity]

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, as stored. CheckpointError where no file holds it."""
        return read_tensor(self._entry(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor called `name`, from its header. CheckpointError where no file holds it."""
        return self._entry(name).shape

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise CheckpointError(f"{self.directory}: no tensor {name!r} in its files; the checkpoint is incomplete")
        return self.entries[name]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config of config.json, if any."""
        return self.config.get("quantization_config")

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def open_checkpoint(directory: Path, config_name: str = CONFIG_NAME) -> Checkpoint:
    """The checkpoint in `directory`; headers are read and checked, data is not.

    Raises CheckpointError where there is none, where it is a pickle, where index and files contradict each other, and
    where a file is none or a link to somewhere else (`survey`).
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    files = survey(directory)
    _refuse_adapter(directory, files)
    _refuse_pointers(directory, files)
    config = _complete(directory, read_json(directory / config_name))
    block = config.get("quantization_config")
    if block is not None and not isinstance(block, dict):
        raise CheckpointError(f"{directory / config_name}: quantization_config is {block!r}, not a JSON object")
    entries: dict[str, TensorEntry] = {}
    for path in _tensor_files(directory):
        for name, entry in read_entries(path).items():
            if name in entries:
                raise CheckpointError(f"tensor {name!r} stands both in {entries[name].path} and in {path}")
            entries[name] = entry
    _check_index(directory, entries)
    require_sizes(config, entries, directory / config_name)
    return Checkpoint(directory, config, entries, files)


def _refuse_adapter(directory: Path, files: Container[str]) -> None:
    """Raise CheckpointError where the directory holds a LoRA adapter and no model."""
    if ADAPTER_NAME in files and INDEX_NAME not in files and SINGLE_NAME not in files:
        base = read_json(directory / ADAPTER_NAME).get("base_model_name_or_path")
        raise CheckpointError(
            f"{directory}: a LoRA adapter of {base!r}, not a model: merge the two first (peft's merge_and_unload, then "
            "save_pretrained)"
        )


def _refuse_pointers(directory: Path, files: Mapping[str, Identity]) -> None:
    """Raise CheckpointError where a file was cloned without Git LFS, which leaves a line in its place."""
    small = (directory / name for name, identity in files.items() if identity.size < POINTER_BYTES)
    for path in (path for path in small if path.suffix in LARGE_FILES):
        if read_bytes(path).startswith(LFS_POINTER):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the file: run git lfs pull in that directory")


def quantization_of(directory: Path, config: dict[str, Any]) -> Any:
    """What is said of the quantization of the model in `directory`, whose config.json is `config`; None for nothing."""
    return _complete(directory, config).get("quantization_config")


def _complete(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its quantization_config in the usual place, wherever `directory` has it."""
    return _with_sidecar(directory, _lifted(config))


def _lifted(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a quantization_config of its text model, as some wrappers have it, in the usual place."""
    inner = config.get("text_config")
    if not isinstance(inner, dict) or inner.get("quantization_config") is None or config.get("quantization_config"):
        return config
    rest = {key: value for key, value in inner.items() if key != "quantization_config"}
    return config | {"text_config": rest, "quantization_config": inner["quantization_config"]}


def _with_sidecar(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a quantization_config from the file beside it, where it has none of its own."""
    for name, method in SIDECARS.items():
        if "quantization_config" not in config and (directory / name).exists():
            config = config | {"quantization_config": {"quant_method": method} | read_json(directory / name)}
    return config


def _tensor_files(directory: Path) -> list[Path]:
    if (directory / INDEX_NAME).exists():
        return _indexed_files(directory)
    if (directory / SINGLE_NAME).exists():
        return [directory / SINGLE_NAME]
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory}: only pickled weights ({', '.join(pickles[:3])}): unpickling runs whatever code the file "
            "holds, so they are never loaded. Save the model with safe_serialization=True, or take its safetensors"
        )
    raise CheckpointError(
        f"{directory}: {len(found)} safetensors files but no {INDEX_NAME}"
        if found
        else f"{directory}: no *.safetensors file"
    )


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX_NAME}: no weight_map")
    return weight_map


def _indexed_files(directory: Path) -> list[Path]:
    names = sorted(set(map(str, _weight_map(directory).values())))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{directory / INDEX_NAME}: shard {name!r} lies outside the model directory")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / INDEX_NAME}: shard {name!r} is missing; the download is incomplete")
    if (directory / SINGLE_NAME).exists() and names != [SINGLE_NAME]:
        raise CheckpointError(
            f"{directory}: {SINGLE_NAME} and, in {INDEX_NAME}, {names[0]}: transformers takes the one, vLLM the other; "
            f"remove {INDEX_NAME} or {SINGLE_NAME}, whichever is left over from before"
        )
    return [directory / name for name in names]


def _check_index(directory: Path, entries: dict[str, TensorEntry]) -> None:
    if not (directory / INDEX_NAME).exists():
        return
    for name, file in _weight_map(directory).items():
        if name not in entries or entries[name].path.name != file:
            where = f"in {entries[name].path.name}" if name in entries else "nowhere"
            raise CheckpointError(f"{directory / INDEX_NAME}: {name!r} should be in {file} and is {where}")


def verify_checksums(checkpoint: Checkpoint, read: Mapping[str, str] = MappingProxyType({})) -> int:
    """The number of weight files compared with a known SHA-256; a mismatch raises CheckpointError.

    read  SHA-256 of files that were read already, by name

    Known sums are those of a SHA256SUMS file in the directory, and of files that are links into a hub cache, where a
    blob's name is its SHA-256.
    """
    sums = _known_sums(checkpoint.directory)
    checked = 0
    for path in sorted({entry.path for entry in checkpoint.entries.values()}):
        blob = path.resolve().name
        expected = sums.get(path.name) or (blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None)
        if expected is None:
            continue
        actual = read.get(path.name) or sha256_of(path)
        if actual != expected:
            raise CheckpointError(
                f"{path}: SHA-256 is {actual}, {expected} was recorded: the file changed or is damaged; get it again"
            )
        checked += 1
    return checked


def require_same_source(checkpoint: Checkpoint, sums: Mapping[str, str]) -> None:
    """Raise Unfinished where a file of `checkpoint` is no longer what it was when it was opened.

    sums  SHA-256 of files as they were read, by name: one of the same content was only moved, or got another link
    """
    for name, identity in checkpoint.files.items():
        path = checkpoint.directory / name
        if not is_same(path, identity) and not (name in sums and path.is_file() and sha256_of(path) == sums[name]):
            raise Unfinished(changed(path))


def _known_sums(directory: Path) -> dict[str, str]:
    """SHA-256 by file name, as SHA256SUMS says; none without it. CheckpointError names a line that says none."""
    path = directory / SUMS_NAME
    if not path.exists():
        return {}
    sums = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        found = SUM_LINE.fullmatch(line)
        if found:
            sums[posixpath.normpath(found[2])] = found[1].lower()
        elif line.strip() and not line.startswith("#"):
            raise CheckpointError(f"{path}:{number}: no line of `sha256sum`, which has 64 digits and a name")
    return sums


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write_sums(directory: Path) -> None:
    """SHA256SUMS over every file of `directory`, in the form `sha256sum -c` reads."""
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    sums = {name: sha256_of(path) for name, path in files.items() if name != SUMS_NAME}
    _say_sums(directory, {CONFIG_NAME if name == UNSEALED_CONFIG else name: digest for name, digest in sums.items()})


def _say_sums(directory: Path, sums: Mapping[str, str]) -> None:
    write_text(directory / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def seal(directory: Path) -> None:
    """Make a written directory a checkpoint: SHA256SUMS over all its files and, last of all, config.json its name."""
    write_sums(directory)
    (directory / UNSEALED_CONFIG).rename(directory / CONFIG_NAME)


def refresh_sums(directory: Path, names: Iterable[str]) -> None:
    """Correct the lines of SHA256SUMS for the files `names`; nothing where the directory has no sums."""
    if not (directory / SUMS_NAME).exists():
        return
    _say_sums(directory, _known_sums(directory) | {name: sha256_of(directory / name) for name in names})
