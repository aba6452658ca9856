"""Location of a model's files: a directory, a hub id, or `demo`. Nothing here imports transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, UsageError, nearest
from lowbit.export.checkpoint import Checkpoint, open_checkpoint
from lowbit.export.dialects import weight_files
from lowbit.export.files import require_regular
from lowbit.export.formats import FLOAT8
from lowbit.export.gguf.container import GGUF
from lowbit.export.snapshot import Snapshot, snapshot_at
from lowbit.models.demo import BASE_MODEL, demo_model_dir, made_before
from lowbit.models.hub import download, download_if_it_answers
from lowbit.models.unpacked import directory_of

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")
DEMO = "demo"
HUB_FILES: tuple[str, ...] = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
DEMO_FILES = ("*.safetensors", *HUB_FILES)
HUB_FILES += ("*.model", "*.model.v*", "*.tiktoken", "*.bpe", "*.spm", "SHA256SUMS", "recipe.toml", "evaluation.jsonl")


@dataclass(frozen=True)
class Files:
    """A model's files, by the user's name for it; its own code may run if `trust_remote_code`."""

    name: str
    checkpoint: Checkpoint
    trust_remote_code: bool

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def snapshot(self) -> Snapshot | None:
        """The repository and commit of the files on the hub; None for a local directory."""
        return snapshot_at(self.directory)


def open_files(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Files:
    """The files of the model `name`, whatever its type: a directory, `demo`, or a hub id. CheckpointError if they are
    damaged."""
    checkpoint = open_checkpoint(model_directory(name, trust_remote_code, revision))
    refuse_scaled_float8(checkpoint)
    return Files(name, checkpoint, trust_remote_code)


def model_directory(name: str, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """The directory of the model `name`, downloaded or created first if needed.

    revision  branch, tag or commit; only for a model on the hub
    """
    if revision is not None and (name == DEMO or Path(name).exists()):
        raise UsageError(f"--revision {revision}: {name} is no model of the hub; only those have revisions")
    if Path(name).is_dir():
        return Path(name)
    if Path(name).suffix == GGUF.suffix and Path(name).exists():
        require_regular(Path(name))
        return directory_of(Path(name))
    if name == DEMO:
        return made_before() or download_if_it_answers(BASE_MODEL, DEMO_FILES) or demo_model_dir()
    _refuse_path(name)
    return download(name, revision, (*weight_files(), *HUB_FILES, *(("*.py",) if trust_remote_code else ())))


def _refuse_path(name: str) -> None:
    """Raise CheckpointError if `name` is the path of a file or of nothing, and so cannot be a hub id."""
    path = Path(name)
    if path.is_file():
        raise CheckpointError(
            f"{name}: a file; a model is a directory with config.json and *.safetensors, or a *{GGUF.suffix}: name the "
            "directory"
        )
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        parent = path.parent
        beside = sorted(each.name for each in parent.iterdir() if each.is_dir()) if parent.is_dir() else []
        near = f"; {nearest(path.name, beside)}" if beside else ""
        raise CheckpointError(f"{name}: no such directory{near}")


def refuse_negative_epsilon(head: Path, config: Any) -> None:
    """CheckpointError if the epsilon of a norm, at any depth of the configuration, is negative: it gives NaN."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for key in EPSILONS if isinstance(value, dict) else ():
            if isinstance(value.get(key), int | float) and value[key] < 0:
                raise CheckpointError(f"{head}: {key} is {value[key]}; a norm cannot compute with a negative one")


def refuse_scaled_float8(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for float8 weights whose scales are not declared in config.json.

    Without the scales the weights would be wrong.
    """
    narrow = [name for name, entry in checkpoint.entries.items() if entry.dtype in FLOAT8]
    scaled = [name for name in narrow if {f"{name}_scale", f"{name}_scale_inv"} & checkpoint.entries.keys()]
    if scaled and checkpoint.quantization is None:
        raise CheckpointError(
            f"{checkpoint.directory}: {len(scaled)} float8 weights with scales, the first {scaled[0]!r}, but "
            "config.json has no quantization_config, which says what the scales mean: use the model's 16-bit version, "
            "or restore its original config.json"
        )
