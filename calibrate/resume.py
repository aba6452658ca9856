"""Journal of a calibrated run: its finished blocks, in a directory next to the output, for --resume.

A block's tensors are stored as compressed-tensors, whatever the output's format; codes, scales and minima of GGUF's
blocks as they are. Its JSON row is written last. It holds
the hash of the tensors, the hash of the block before, the hash of `key.json` (everything that determines the bytes),
and a hash of itself. A block counts only if all hashes match.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.calibrate import ranks
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.job import Job
from lowbit.calibrate.outcome import BlockOutcome
from lowbit.calibrate.report import BlockReport
from lowbit.errors import CheckpointError, LowbitError, Unfinished
from lowbit.export.checkpoint import sha256_of
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.export.files import sync
from lowbit.export.format import TensorReader
from lowbit.export.plain import read_json, write_json
from lowbit.export.staging import only_run, place_of, told_whole
from lowbit.export.tensorfile import TensorFileWriter, read_entries, read_tensor
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, parse_scheme

KEY = "key.json"
CODES, SCALES, MINIMA = "codes", "scales", "minima"
REMAINDER = ".remainder"  # after a linear's name: what rounding took from its weight
START_OVER = "run without --resume to start over"


def journal_of(output: Path) -> Path:
    """The directory of the journal for `output`."""
    place = place_of(output)
    return place.with_name(f".{place.name}.journal")


def key_of(job: Job, calibration: CalibrationSet | None, sums: Mapping[str, str]) -> dict[str, Any]:
    """Everything that determines a block's bytes, as JSON values: hashes of model files, recipe, tokens, versions.

    sums  known SHA-256 of files, by name
    """
    files = {entry.path for entry in job.source.checkpoint.entries.values()} | {job.source.checkpoint.head}
    recipe = asdict(replace(job.recipe, calibration_sha256=None, model_commit=None))  # files are told apart by hash
    key = {
        "lowbit": __version__,
        "torch": torch.__version__,
        "device": torch.device(job.device).type,
        "model": {path.name: sums.get(path.name) or sha256_of(path) for path in sorted(files)},
        "calibration": calibration.sha256 if calibration else None,
        "recipe": recipe,
    }
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _holding(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The journal's tensors of the linear `name`."""
    if not weight.scheme.weights.blocks:
        return COMPRESSED_TENSORS.write(name, weight)
    sides = {f"{name}.{MINIMA}": weight.zeros} if weight.zeros is not None else {}
    return {f"{name}.{CODES}": weight.codes, f"{name}.{SCALES}": weight.scales} | sides


def _held(name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
    """The weight of the linear `name`: the inverse of `_holding`."""
    if not scheme.weights.blocks:
        return COMPRESSED_TENSORS.read(name, tensor, scheme)
    minima = tensor(f"{name}.{MINIMA}") if scheme.weights.minima else None
    return QTensor(tensor(f"{name}.{CODES}"), tensor(f"{name}.{SCALES}"), minima, scheme)


class Journal:
    """The finished blocks of a run.

    directory  created with the first block
    key        the run's `key_of`
    finished   number of valid blocks from an earlier run with the same key, counted from the first block
    damage     the reason why the next block is invalid; None if it is just missing
    """

    def __init__(self, directory: Path, key: dict[str, Any]) -> None:
        self.directory, self._key = directory, key
        self._bound = _hash_of(key)
        self._before = ""  # hash of the latest block's tensors
        self.finished = 0
        self.damage: str | None = None

    @property
    def sums(self) -> dict[str, str]:
        """SHA-256 of the model's files by name, at the start of the run."""
        return self._key.get("model", {})

    def resume(self) -> None:
        """Use the blocks of an earlier run, if there are any. CheckpointError if that run had another key."""
        if self.directory.is_symlink() or not self.directory.is_dir():
            return
        try:
            found = read_json(self.directory / KEY)
        except CheckpointError as error:
            self.damage = str(error)
        else:
            if found != self._key:
                difference = _difference(found, self._key) or f"or its {KEY} is damaged"
                if not self._row(0).exists() or self._reason_against(0):  # a block knows whose it is
                    raise CheckpointError(f"{self.directory}: made by another run, {difference}; {START_OVER}")
                self._before, self.damage = "", f"{self.directory / KEY} is not what was written"
        while self._row(self.finished).exists():
            reason = self._reason_against(self.finished)
            if reason is not None:
                self.damage = f"block {self.finished + 1} in {self.directory} is damaged: {reason}"
                break
            self.finished += 1

    def _reason_against(self, index: int) -> str | None:
        """The reason why block `index`, which has a row, is invalid, or None."""
        try:
            row = read_json(self._row(index))
            if row.pop("sha256", None) != _hash_of(row):
                return f"{self._row(index).name} is not what was written"
            if (row["key"], row["before"]) != (self._bound, self._before):
                return "it is of another run"
            if row["tensors"] != sha256_of(self._tensors(index)):
                return f"{self._tensors(index).name} is not what was written"
            self._before = row["tensors"]
        except FileNotFoundError:
            return f"{self._tensors(index).name} is missing"
        except CheckpointError as error:
            return str(error)
        return None

    def read(self, index: int) -> BlockOutcome | None:
        """The outcome of block `index`, or None if it is not finished. CheckpointError for damaged files."""
        if index >= self.finished:
            return None
        entries = read_entries(self._tensors(index))
        row = read_json(self._row(index))
        try:
            weights = {
                name: _held(name, lambda key: read_tensor(entries[key]), parse_scheme(scheme))
                for name, scheme in row["weights"].items()
            }
            kept = {name: read_tensor(entries[name]) for name in row["kept"]}
            cache = {name: read_tensor(entries[name]) for name in row["cache"]}
            remainders = {name: read_tensor(entries[name + REMAINDER]) for name in row["remainders"]}
            return BlockOutcome(weights, kept, BlockReport(**row["report"]), cache, remainders)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._tensors(index)}: no finished block ({error}); {START_OVER}") from error

    def add(self, index: int, outcome: BlockOutcome) -> None:
        """Add the outcome of block `index`. It is durable on disk on return."""
        if index == 0:
            self._begin()
        part = self._tensors(index).with_suffix(".part")
        for path in (part, self._tensors(index), self._row(index)):
            _make_room(path)
        writer = TensorFileWriter(part)
        for name, weight in outcome.weights.items():
            for key, tensor in _holding(name, weight).items():
                writer.add(key, tensor)
        for name, tensor in (outcome.kept | outcome.cache).items():
            writer.add(name, tensor)
        for name, tensor in outcome.remainders.items():
            writer.add(name + REMAINDER, tensor)
        writer.close()
        before, self._before = self._before, sha256_of(part)
        row = {
            "key": self._bound,
            "before": before,
            "tensors": self._before,
            "weights": {name: str(weight.scheme) for name, weight in outcome.weights.items()},
            "kept": list(outcome.kept),
            "cache": list(outcome.cache),
            "remainders": list(outcome.remainders),
            "report": asdict(outcome.report),
        }
        row = json.loads(json.dumps(row))
        part.replace(self._tensors(index))
        write_json(self._row(index), row | {"sha256": _hash_of(row)})
        sync(self.directory)

    def remove(self) -> None:
        """Delete the journal."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _begin(self) -> None:
        _make_room(self.directory)
        self.directory.mkdir()
        write_json(self.directory / KEY, self._key)

    def _tensors(self, index: int) -> Path:
        return self.directory / f"block-{index:05}.safetensors"

    def _row(self, index: int) -> Path:
        return self.directory / f"block-{index:05}.json"


@contextmanager
def journaled(
    output: Path,
    job: Job,
    calibration: CalibrationSet | None,
    resume: bool,
    sums: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Journal]:
    """A context with the journal of a run that writes `output`.

    sums    known SHA-256 of the model's files, by name
    resume  use an interrupted run's blocks; otherwise they are deleted once the first new block is finished

    The journal is deleted if the run succeeds or is refused. It is kept if the run is interrupted, killed or crashes,
    or if the disk is full. Only the leader writes it; other ranks read the blocks that the leader resumed.
    """
    if not ranks.leads():
        yield _followed(output)
        return
    with only_run(output):
        key = key_of(job, calibration, sums)
        journal = Journal(journal_of(output), key)
        if resume:
            journal.resume()
        ranks.leaders_number(journal.finished)
        try:
            yield journal
        except Unfinished as error:
            kept = journal.directory.exists()
            raise Unfinished(f"{error}{'; finished blocks are kept: see --resume' if kept else ''}") from error
        except LowbitError:
            journal.remove()
            raise
        with told_whole(output):
            journal.remove()


def _followed(output: Path) -> Journal:
    """The leader's journal, read-only for another rank."""
    journal = Journal(journal_of(output), {})
    journal.finished = int(ranks.leaders_number(0))
    return journal


def _make_room(path: Path) -> None:
    """Delete whatever is at `path`, a directory too; not the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _hash_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The differences between two keys, as text."""
    theirs, ours = found.get("recipe", {}), wanted["recipe"]
    if found.get("model") != wanted["model"]:
        names = [name for name, digest in wanted["model"].items() if found.get("model", {}).get(name) != digest]
        return f"of a model with another {', '.join(names) or 'set of files'}"
    if theirs != ours:
        keys = [key for key, value in ours.items() if theirs.get(key) != value]
        return "with another recipe: " + ", ".join(f"{key} {theirs.get(key)}, not {ours[key]}" for key in keys)
    if found.get("calibration") != wanted["calibration"]:
        return f"with calibration tokens {found.get('calibration')}, not {wanted['calibration']}"
    keys = [key for key in ("lowbit", "torch", "device") if found.get(key) != wanted[key]]
    return ", ".join(f"with {key} {found.get(key)}, not {wanted[key]}" for key in keys)
