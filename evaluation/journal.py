"""Cache of measurements: an interrupted evaluation continues where it stopped, and a finished one is not repeated.

A journal is a file of JSON lines, one per finished piece (a window, a problem, a prompt). Its name is a hash of
everything that determines the result: weights, token ids, protocol, backend and versions. A damaged line is dropped
together with all lines after it. Several processes may work on one journal: lines are read and added under a lock.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import astuple
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit import __version__
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import Backend
from lowbit.export.checkpoint import sha256_of
from lowbit.export.dialects import weight_files
from lowbit.export.files import changed, held, is_same, survey, write_text
from lowbit.export.plain import parse_json, read_json, require_object

COMPUTING = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.py",
)  # files that affect results, and weights
RESULTS = ("report.json", "quantization_report.json")  # written next to the weights, for people


class Journal:
    """The finished pieces of one measurement. With `path` None they are kept in memory only.

    lost  called with the error if the disk is full: the measurement goes on, in memory only
    """

    def __init__(self, path: Path | None = None, lost: Callable[[OSError], None] = lambda error: None) -> None:
        self._path, self._lost = path, lost
        self.rows: dict[int, dict[str, Any]] = {}
        if path is not None and path.exists():
            with held(path.parent):
                self.rows = {row.pop("piece"): row for row in _whole_lines(path)}

    def add(self, piece: int, row: dict[str, Any]) -> None:
        """Add the result of `piece`; it is in the file on return, if that can be written."""
        self.rows[piece] = row
        if self._path is None:
            return
        try:
            with held(self._path.parent), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"piece": piece} | row) + "\n")
        except OSError as error:
            self._path = None
            self._lost(error)


class Library:
    """The journals in `directory`; with None nothing is written to disk.

    note  called once with a sentence if the disk is full
    """

    def __init__(self, directory: Path | None = None, note: Callable[[str], None] = lambda text: None) -> None:
        self.directory, self._note, self._full = directory, note, False

    def journal(self, kind: str, backends: list[Backend], **facts: Any) -> Journal:
        """The journal of a measurement `kind` of `backends`, keyed by `facts` (JSON values) too."""
        if self.directory is None:
            return Journal()
        self.directory.mkdir(parents=True, exist_ok=True)
        models = [
            [backend.name, backend.device, str(backend.dtype), self.fingerprint(backend.source.directory)]
            for backend in backends
        ]
        versions = [__version__, torch.__version__, transformers.__version__]
        key = hash_of({"kind": kind, "models": models, "versions": versions} | facts)
        return Journal(self.directory / f"{kind}-{key[:32]}.jsonl", self._lose)

    def _lose(self, error: OSError) -> None:
        if not self._full:
            self._note(f"{self.directory}: {error.strerror}; what is finished from here on is not kept")
        self._full = True

    def fingerprint(self, directory: Path) -> str:
        """A hash of all files of a checkpoint that affect results: weights, configuration, tokenizer, templates and
        code.

        A known file is not hashed again if inode, size, modification time and change time are equal; the change time
        cannot be forged. CheckpointError if a file changes while it is hashed.
        """
        assert self.directory is not None
        known_path = self.directory / "hashes.json"
        known = _known_hashes(known_path)
        sums = {}
        computing = (*COMPUTING, *weight_files())
        for name, identity in survey(directory).items():
            if name in RESULTS or not any(fnmatch(name, pattern) for pattern in computing):
                continue
            path = directory / name
            key = f"{path.resolve()}:{':'.join(map(str, astuple(identity)))}"
            sums[name] = known[key] = known.get(key) or sha256_of(path)
            if not is_same(path, identity):
                raise CheckpointError(changed(path))
        try:
            with held(self.directory):
                write_text(known_path, json.dumps(_known_hashes(known_path) | known, indent=0))
        except OSError as error:
            self._lose(error)
        return hash_of(sums)


def _known_hashes(path: Path) -> dict[str, str]:
    """The stored hashes; empty if the file is damaged."""
    try:
        return {key: str(value) for key, value in read_json(path).items()}
    except CheckpointError:
        return {}


def hash_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines. Truncates the file after them, so that the next line starts on its own."""
    data, rows, whole = path.read_bytes(), [], 0
    for line in data.splitlines(keepends=True):
        try:
            row = require_object(parse_json(line, path), path)
        except CheckpointError:
            break
        if not line.endswith(b"\n") or not isinstance(row.get("piece"), int):
            break
        rows.append(row)
        whole += len(line)
    if whole < len(data):
        path.write_bytes(data[:whole])
    return rows
