"""Writing the files of a checkpoint: weights in shards, JSON, and what is carried along."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.export.checkpoint import INDEX_NAME, PICKLES, SINGLE_NAME, SUMS_NAME, UNSEALED_CONFIG
from lowbit.export.dialects import SIDECARS
from lowbit.export.files import open_regular, replacing, survey, write_text
from lowbit.export.tensorfile import TensorFileWriter

# What a model directory holds beside its weights is carried along, so that a reader of the quantized one finds the same
# tokenizer, templates, licences and policies of use. Left behind: weights in any program's form, what is written anew,
# code, pictures of a model card, and what is too large to be any of those.
WEIGHTS: tuple[str, ...] = (
    "*.safetensors",
    *(f"*{ending}" for ending in PICKLES),
    "*.pkl",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
)
WEIGHTS += ("*.np[yz]", "*.ot", "*.tflite", "*.mlmodel", "*.zip", "*.tar*", "events.out.*")
WRITTEN_ANEW: tuple[str, ...] = (
    "config.json",
    SUMS_NAME,
    "*.index.json",
    *SIDECARS,
    "README.md",
    "recipe.toml",
    "report.html",
)
WRITTEN_ANEW += ("evaluation.jsonl", UNSEALED_CONFIG)
CODE = ("*.py", "*.pyc", "*.sh", "*.ipynb", "requirements.txt")
PICTURES = ("*.png", "*.jp*g", "*.gif", "*.svg", "*.webp", "*.mp[34]", "*.wav")
LARGEST_COMPANION = 100_000_000  # bytes; the largest tokenizers take a third of it


class ShardedWriter:
    """Writes tensors as they come into `model-0000i-of-0000N.safetensors` and an index, or one model.safetensors.

    directory        where; it must exist
    max_shard_bytes  a file is closed before it would grow beyond this (a single larger tensor gets a file of its own)
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

    def finish(self) -> None:
        """Give the files their final names and write the index where there are several."""
        self._close_shard()
        count = len(self._done)
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._done, start=1):
            final = SINGLE_NAME if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            write_json(self.directory / INDEX_NAME, {"metadata": {"total_size": self._total}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_companions(source: Path, target: Path, with_code: bool) -> list[str]:
    """Names of the files copied that are small and no weights (see above); *.py too where `with_code`.

    Raises CheckpointError where one is a link to somewhere else (`survey`).
    """
    left = WEIGHTS + WRITTEN_ANEW + PICTURES + tuple(pattern for pattern in CODE if pattern != "*.py" or not with_code)
    files = {name: identity.size for name, identity in survey(source).items() if not _matches(name, left)}
    copied = [name for name, size in files.items() if size <= LARGEST_COMPANION]
    for name in copied:
        (target / name).parent.mkdir(exist_ok=True)
        with open_regular(source / name) as original, replacing(target / name) as copy:
            shutil.copyfileobj(original, copy)
    return copied


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
