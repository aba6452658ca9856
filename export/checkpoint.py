"""A checkpoint directory: configuration and tensors, validated on opening."""

import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lowbit.ahead import WORKERS, ahead
from lowbit.errors import CheckpointError, Unfinished
from lowbit.export.container import UNFINISHED, Container
from lowbit.export.dialects import containers, sidecars, weight_files
from lowbit.export.files import Identity, changed, is_same, open_regular, read_bytes, read_text, survey, write_text
from lowbit.export.plain import read_json
from lowbit.export.sharded import SAFETENSORS
from lowbit.export.sizes import require_sizes
from lowbit.export.tensorfile import TensorEntry, read_tensor

SUMS_NAME = "SHA256SUMS"
SUM_LINE = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(.+)")
LARGE_FILES = ("*.json", "*.model")  # other file types that repositories keep in Git LFS
POINTER_BYTES = 1024  # larger than any LFS pointer
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a model's configuration and its tensors.

    directory  its path
    config     contents of config.json
    entries    all tensors by name
    files      identity of every file when it was opened, by name
    container  container of its files
    head       the file that holds config.json, for messages
    """

    directory: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    files: Mapping[str, Identity]
    container: Container
    head: Path

    def read(self, name: str) -> Tensor:
        """The tensor `name`, as stored. CheckpointError if no file holds it."""
        return read_tensor(self._entry(name))

    def companions(self) -> AbstractContextManager[Path]:
        """A context with a directory that holds the tokenizer, templates and generation config as files."""
        return self.container.companions(self.directory)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, from its header. CheckpointError if no file holds it."""
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


def open_checkpoint(directory: Path, finished: bool = True) -> Checkpoint:
    """The checkpoint in `directory`. Headers are read and checked, data is not.

    finished  False for a checkpoint that is written but not sealed yet

    Raises CheckpointError if there is no checkpoint, if it is a pickle, if its files contradict each other, or if a
    file is not a regular one or a link to a place outside (`survey`).
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    files = survey(directory)
    _refuse_pointers(directory, files)
    container = next((each for each in containers() if each.holds(directory, finished)), SAFETENSORS)
    head = container.head_in(directory, finished)
    config, entries = container.read(directory, head)
    config = _complete(directory, config)
    block = config.get("quantization_config")
    if block is not None and not isinstance(block, dict):
        raise CheckpointError(f"{head}: quantization_config is {block!r}, not a JSON object")
    require_sizes(config, entries, head)
    return Checkpoint(directory, config, entries, files, container, head)


def _refuse_pointers(directory: Path, files: Mapping[str, Identity]) -> None:
    """Raise CheckpointError for a file cloned without Git LFS, which is only a pointer."""
    small = (directory / name for name, identity in files.items() if identity.size < POINTER_BYTES)
    large = (*LARGE_FILES, *weight_files())
    for path in (path for path in small if any(fnmatch(path.name, pattern) for pattern in large)):
        if read_bytes(path).startswith(LFS_POINTER):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the file: run git lfs pull in that directory")


def quantization_of(directory: Path, config: dict[str, Any]) -> Any:
    """The quantization_config of the model in `directory` with the config.json `config`; None without one."""
    return _complete(directory, config).get("quantization_config")


def _complete(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its quantization_config in the usual place, wherever `directory` has it."""
    if config.get("quantization_config") in ({}, None):  # empty: not quantized
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    return _with_sidecar(directory, _lifted(config))


def _lifted(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the text model's quantization_config, as some wrappers have it, moved to the top level."""
    inner = config.get("text_config")
    if not isinstance(inner, dict) or inner.get("quantization_config") is None or config.get("quantization_config"):
        return config
    rest = {key: value for key, value in inner.items() if key != "quantization_config"}
    return config | {"text_config": rest, "quantization_config": inner["quantization_config"]}


def _with_sidecar(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the quantization_config from a separate file, if config.json has none."""
    for name, method in sidecars().items():
        if "quantization_config" not in config and (directory / name).exists():
            config = config | {"quantization_config": {"quant_method": method} | read_json(directory / name)}
    return config


def verify_checksums(checkpoint: Checkpoint, read: Mapping[str, str] = MappingProxyType({})) -> int:
    """The number of weight files compared with a known SHA-256; a mismatch raises CheckpointError.

    read  known SHA-256 of files, by name

    Expected sums come from SHA256SUMS in the directory, and from links into a hub cache, where a blob's name is its
    SHA-256.
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
    """Raise Unfinished if a file of `checkpoint` has changed since it was opened.

    sums  SHA-256 of files when they were read, by name: a file with equal content was only moved or linked again
    """
    for name, identity in checkpoint.files.items():
        path = checkpoint.directory / name
        if not is_same(path, identity) and not (name in sums and path.is_file() and sha256_of(path) == sums[name]):
            raise Unfinished(changed(path))


def _known_sums(directory: Path) -> dict[str, str]:
    """SHA-256 by file name from SHA256SUMS; empty without it. CheckpointError names a malformed line."""
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


def write_sums(
    directory: Path, meant: Mapping[str, str] = MappingProxyType({}), read: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write SHA256SUMS over every file of `directory`, in the format of `sha256sum -c`.

    meant  SHA-256 of files as they were written, by name; CheckpointError if one reads back differently
    read   SHA-256 of files as they were read back, by name: they are not read again
    """
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    named = [name for name in files if name not in (SUMS_NAME, *read)]
    with ahead(sha256_of, [files[name] for name in named], WORKERS) as found:
        sums = dict(zip(named, found, strict=True)) | dict(read)
    for name, digest in meant.items():
        if sums[name] != digest:
            raise CheckpointError(f"{directory / name}: does not read back as it was written; the disk may be failing")
    _say_sums(directory, {name.removesuffix(UNFINISHED): digest for name, digest in sums.items()})


def _say_sums(directory: Path, sums: Mapping[str, str]) -> None:
    write_text(directory / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def seal(
    directory: Path,
    container: Container,
    meant: Mapping[str, str] = MappingProxyType({}),
    read: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Make a written directory a checkpoint: SHA256SUMS over all its files and, last of all, its head's name.

    meant, read  as in `write_sums`
    """
    write_sums(directory, meant, read)
    container.seal(directory)


def refresh_sums(directory: Path, names: Iterable[str]) -> None:
    """Update the lines of SHA256SUMS for the files `names`; does nothing if the directory has no sums."""
    if not (directory / SUMS_NAME).exists():
        return
    _say_sums(directory, _known_sums(directory) | {name: sha256_of(directory / name) for name in names})
