"""The container of transformers and vLLM: config.json, and one safetensors file, or several with an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.container import Container, Writer
from lowbit.export.plain import read_json, write_json
from lowbit.export.tensorfile import TensorEntry, TensorFileWriter, read_entries

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"  # peft's
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Safetensors(Container):
    """Weights in *.safetensors, the configuration in config.json, everything else in separate files."""

    head = CONFIG_NAME
    weights = ("*.safetensors",)

    def holds(self, directory: Path, finished: bool = True) -> bool:
        """True if there are safetensors files; other containers may have a config.json too."""
        return any(directory.glob("*.safetensors"))

    def read(self, directory: Path, head: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        """config.json, and the tensors of every file.

        Raises CheckpointError if there are only pickles, or if index and files contradict each other.
        """
        _refuse_adapter(directory)
        config = read_json(head)
        entries: dict[str, TensorEntry] = {}
        for path in _tensor_files(directory):
            for name, entry in read_entries(path).items():
                if name in entries:
                    raise CheckpointError(f"tensor {name!r} is both in {entries[name].path} and in {path}")
                entries[name] = entry
        _check_index(directory, entries)
        return config, entries

    def writer(self, directory: Path, max_shard_bytes: int) -> "ShardedWriter":
        """A writer of files of at most `max_shard_bytes`."""
        return ShardedWriter(directory, max_shard_bytes)


SAFETENSORS = Safetensors()


def _refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError if the directory holds a LoRA adapter and no model."""
    here = {name: (directory / name).exists() for name in (ADAPTER_NAME, INDEX_NAME, SINGLE_NAME)}
    if here == {ADAPTER_NAME: True, INDEX_NAME: False, SINGLE_NAME: False}:
        base = read_json(directory / ADAPTER_NAME).get("base_model_name_or_path")
        raise CheckpointError(
            f"{directory}: a LoRA adapter of {base!r}, not a model: merge the two first (peft's merge_and_unload, then "
            "save_pretrained)"
        )


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


def write_index(directory: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    """Write the index of several files: the file of each tensor, and the bytes of all."""
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": nbytes}, "weight_map": dict(weight_map)})


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
            f"{directory}: {SINGLE_NAME} and, in {INDEX_NAME}, {names[0]}: transformers loads the first, vLLM the "
            f"second; remove {INDEX_NAME} or {SINGLE_NAME}, the outdated one"
        )
    return [directory / name for name in names]


def _check_index(directory: Path, entries: dict[str, TensorEntry]) -> None:
    if not (directory / INDEX_NAME).exists():
        return
    for name, file in _weight_map(directory).items():
        if name not in entries or entries[name].path.name != file:
            where = f"in {entries[name].path.name}" if name in entries else "nowhere"
            raise CheckpointError(f"{directory / INDEX_NAME}: {name!r} should be in {file} and is {where}")


class ShardedWriter(Writer):
    """Writes tensors in order of arrival into `model-0000i-of-0000N.safetensors` and an index, or one
    model.safetensors.

    directory        an existing directory
    max_shard_bytes  size limit of a file; a larger single tensor gets a file of its own
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self._done: list[tuple[Path, list[str]]] = []
        self._open: TensorFileWriter | None = None
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._open and self._open.nbytes and self._open.nbytes + nbytes > self.max_shard_bytes:
            self._close_shard()
        if self._open is None:
            self._open = TensorFileWriter(self.directory / f"shard-{len(self._done):05d}")
        self._open.add(name, tensor)
        self._total += nbytes

    def _close_shard(self) -> None:
        if self._open is not None:
            self._open.close()
            self._done.append((self._open.path, self._open.names()))
            self._open = None

    def finish(self, config: Mapping[str, Any]) -> None:
        """Give the files their final names, and write the configuration, and the index if there are several files."""
        self._close_shard()
        count = len(self._done)
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._done, start=1):
            final = SINGLE_NAME if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            write_index(self.directory, weight_map, self._total)
        write_json(SAFETENSORS.head_in(self.directory, finished=False), config)
