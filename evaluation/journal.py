"""What was measured is kept: an interrupted evaluation goes on where it stopped, and a finished one is not repeated.

A journal is a file of JSON lines, one for each finished piece (a window, a problem, a prompt), named by a hash of all
that decides the result: the checkpoint's weights, the token ids, the protocol, the backend and the versions. A line
that a killed process left unfinished is dropped.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit import __version__
from lowbit.evaluation.backend import Backend
from lowbit.export.checkpoint import sha256_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json")


class Journal:
    """The finished pieces of one measurement. `path` None keeps them in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.rows: dict[int, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.rows = {row.pop("piece"): row for row in _whole_lines(path)}

    def add(self, piece: int, row: dict[str, Any]) -> None:
        """Keep the result of `piece`: in the file before this returns."""
        self.rows[piece] = row
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"piece": piece} | row) + "\n")


class Library:
    """The journals in `directory`; None keeps nothing on disk."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    def journal(self, kind: str, backends: list[Backend], **facts: Any) -> Journal:
        """The journal of the measurement called `kind` of `backends`, decided by `facts` (JSON values) besides."""
        if self.directory is None:
            return Journal()
        self.directory.mkdir(parents=True, exist_ok=True)
        models = [
            [backend.name, backend.device, str(backend.dtype), self.fingerprint(backend.source.directory)]
            for backend in backends
        ]
        versions = [__version__, torch.__version__, transformers.__version__]
        key = hash_of({"kind": kind, "models": models, "versions": versions} | facts)
        return Journal(self.directory / f"{kind}-{key[:32]}.jsonl")

    def fingerprint(self, directory: Path) -> str:
        """A hash of a checkpoint's weights, configuration and tokenizer. Files that kept size and time are not read."""
        assert self.directory is not None
        files = [*sorted(directory.glob("*.safetensors")), directory / "config.json"]
        files += [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
        known_path = self.directory / "hashes.json"
        known: dict[str, str] = json.loads(known_path.read_text()) if known_path.exists() else {}
        sums = {}
        for path in files:
            stat = path.stat()
            identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            sums[path.name] = known[identity] = known.get(identity) or sha256_of(path)
        partial = known_path.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=0))
        partial.replace(known_path)
        return hash_of(sums)


def hash_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole; the file is cut back to them, so that the next one begins on a line of its own."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]
