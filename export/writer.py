"""Writing of a checkpoint in a format, and copying of a model's other files."""

import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.export.checkpoint import SUMS_NAME, Checkpoint
from lowbit.export.container import UNFINISHED
from lowbit.export.dialects import containers, sidecars, weight_files
from lowbit.export.files import open_regular, replacing, survey
from lowbit.export.format import Format
from lowbit.export.plain import write_json
from lowbit.export.sharded import PICKLES
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

# Other files of the model directory are copied, so that readers of the quantized model find the same tokenizer,
# templates, licences and policies. Not copied: weights in any format, files that are written anew, code, images of a
# model card, and very large files.
WEIGHTS = (*(f"*{ending}" for ending in PICKLES), "*.pkl", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.np[yz]", "*.ot")
WEIGHTS += ("*.tflite", "*.mlmodel", "*.zip", "*.tar*", "events.out.*")
WRITTEN_ANEW = (
    "*.index.json",
    "README.md",
    "recipe.toml",
    "report.html",
    "evaluation.jsonl",
    f"*{UNFINISHED}",
    SUMS_NAME,
)
CODE = ("*.py", "*.pyc", "*.sh", "*.ipynb", "requirements.txt")
PICTURES = ("*.png", "*.jp*g", "*.gif", "*.svg", "*.webp", "*.mp[34]", "*.wav")
LARGEST_COMPANION = 100_000_000  # bytes; three times the largest tokenizers


class CheckpointWriter:
    """Writes a checkpoint in a format: tensors in order of arrival, the configuration last."""

    def __init__(self, fmt: Format, directory: Path, max_shard_bytes: int) -> None:
        self.format, self.directory = fmt, directory
        self._files = fmt.container.writer(directory, max_shard_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is no part of a quantized weight."""
        self._files.add(name, tensor)

    def add_weight(self, name: str, weight: QTensor) -> None:
        """Write the quantized linear `name`."""
        self.add_written(self.format.write(name, weight))

    def add_written(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what the format has made of a quantized linear."""
        for key, tensor in tensors.items():
            self._files.add(key, tensor)

    def add_cache(self, scales: Mapping[str, Tensor]) -> None:
        """Write scales of a key-value cache, named `A.k_scale`."""
        for name, tensor in self.format.cached(scales).items():
            self._files.add(name, tensor)

    def finish(
        self,
        config: Mapping[str, Any],
        schemes: Mapping[str, Scheme],
        unquantized: Iterable[str],
        cache: str | None = None,
    ) -> None:
        """Close the files and write the configuration under a name that readers ignore, until the container seals it.

        cache  the key-value cache that it declares: "fp8", "fp8-head", or None
        """
        self._files.finish(configured(self.format, self.directory, config, schemes, unquantized, cache))


def configured(
    fmt: Format,
    directory: Path,
    config: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
    unquantized: Iterable[str],
    cache: str | None = None,
) -> dict[str, Any]:
    """`config` with its quantization_config, which is also written to the format's extra file, if it has one."""
    block = fmt.quantization_config(schemes, unquantized)
    block = block if cache is None else fmt.with_cache(block, cache)
    if fmt.sidecar:
        write_json(directory / fmt.sidecar, block)
    return dict(config) | {"quantization_config": block}


def carry_along(checkpoint: Checkpoint, target: Path, with_code: bool) -> None:
    """Copy a checkpoint's companions, including those inside its files, into the directory `target`."""
    with checkpoint.companions() as companions:
        for place in dict.fromkeys((checkpoint.directory, companions)):
            copy_companions(place, target, with_code)


def copy_companions(source: Path, target: Path, with_code: bool) -> list[str]:
    """Copy small files that are not weights (see above), with *.py only if `with_code`. Returns their names.

    CheckpointError for a link to a place outside (`survey`).
    """
    stored = (*weight_files(), *(container.head for container in containers()))
    code = tuple(pattern for pattern in CODE if pattern != "*.py" or not with_code)
    left = stored + WEIGHTS + WRITTEN_ANEW + tuple(sidecars()) + PICTURES + code
    files = {name: identity.size for name, identity in survey(source).items() if not _matches(name, left)}
    copied = [name for name, size in files.items() if size <= LARGEST_COMPANION]
    for name in copied:
        (target / name).parent.mkdir(exist_ok=True)
        with open_regular(source / name) as original, replacing(target / name) as copy:
            shutil.copyfileobj(original, copy)
    return copied


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
