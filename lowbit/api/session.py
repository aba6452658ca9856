"""Setup shared by all evaluations: models, text, progress, and the place of results."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from lowbit import __version__
from lowbit.api.recording import store
from lowbit.api.shared import Note, ignore
from lowbit.calibrate.data import builtin_text
from lowbit.calibrate.documents import SEPARATOR, Reading, documents
from lowbit.calibrate.tables import TABLES, kind_of, local_rows, read_utf8
from lowbit.errors import UsageError, nearest
from lowbit.evaluation.after import HELDOUT
from lowbit.evaluation.backend import BACKENDS, Backend, choose_backend, open_backend
from lowbit.evaluation.journal import Library
from lowbit.evaluation.perplexity import OnStep, Score
from lowbit.evaluation.text import Cut, Protocol
from lowbit.export.snapshot import refuse_to_write_into
from lowbit.models.cache import cache_dir
from lowbit.models.devices import check_device
from lowbit.models.files import model_directory
from lowbit.models.source import Source, open_source
from lowbit.progress import Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILTIN_WINDOWS = 16


@dataclass(frozen=True)
class Scored:
    """The final score of one model on the text."""

    score: Score


Event = Step | Scored | Note
OnEvent = Callable[[Event], None]


class Setup(TypedDict, total=False):
    """Keywords of every evaluation.

    backend   "auto", "transformers", "blocks", "engine" or "vllm"
    device    "auto", "cpu", "cuda", "cuda:1"
    dtype     "float32", "bfloat16" or "float16"
    revision, baseline_revision  branch, tag or commit of the checkpoint and the baseline, if they are hub ids
    keep      cache finished windows, and continue an interrupted run
    store     also append the result to the checkpoint's evaluation.jsonl
    progress  called with each Event
    """

    backend: str
    device: str
    dtype: str
    revision: str | None
    baseline_revision: str | None
    trust_remote_code: bool
    keep: bool
    store: bool
    progress: OnEvent


class TextSetup(Setup, total=False):
    """Setup, and the text to score with its protocol.

    text         a UTF-8 file, a table as `dataset` takes it, or "builtin": held-out documentation
    text_column  column of the table
    protocol     "gptq": windows that do not overlap; "strided": windows `stride` apart, each token scored once
    context      tokens in a window
    stride       tokens between windows; default: half of `context`
    windows      number of windows to score; default: 16 of builtin, all of a file
    bos          "first" or "every": whether only the first window or every window begins with BOS
    """

    text: str
    text_column: str | None
    protocol: Literal["gptq", "strided"]
    context: int
    stride: int | None
    windows: int | None
    bos: Literal["first", "every"]


@dataclass(frozen=True)
class Text:
    """The keywords that TextSetup adds, with their defaults."""

    text: str = "builtin"
    text_column: str | None = None
    protocol: str = "gptq"
    context: int = 512
    stride: int | None = None
    windows: int | None = None
    bos: str = "first"

    def cut_by(self) -> Protocol:
        """The protocol. UsageError for an unknown protocol, or for a stride with protocol "gptq"."""
        if self.protocol not in ("gptq", "strided"):
            raise UsageError(f"--protocol {self.protocol!r}: write gptq or strided")
        if self.stride is not None and self.protocol != "strided":
            raise UsageError("--stride belongs to --protocol strided")
        step = (self.stride or max(self.context // 2, 1)) if self.protocol == "strided" else None
        windows = BUILTIN_WINDOWS if self.windows is None and self.text == "builtin" else self.windows
        return Protocol(self.context, step, windows, self.bos == "every")

    def read(self, source: Source) -> tuple[str, Reading | None]:
        """The text, and for a table the rows read and skipped. Chats are rendered by the template of `source`."""
        path = Path(self.text)
        if kind_of(self.text) in TABLES:
            reading = Reading(path.name)
            texts = documents(local_rows(path, None), source.tokenizer(), reading, self.text_column)
            return SEPARATOR.join(each.rstrip() for each in texts if each.strip()), reading
        if self.text_column is not None:
            raise UsageError(
                f"--text {self.text}: plain text has no column {self.text_column!r}; leave --text-column out"
            )
        if self.text == "builtin":
            return builtin_text("heldout"), None
        return read_utf8(path), None


@dataclass(frozen=True)
class Session:
    """One evaluation: a checkpoint, an optional baseline, and the keywords of Setup."""

    checkpoint: str
    baseline: str | None = None
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    revision: str | None = None
    baseline_revision: str | None = None
    trust_remote_code: bool = False
    keep: bool = True
    store: bool = False
    progress: OnEvent = ignore

    def models(self) -> list[str]:
        """The checkpoint, then the baseline if there is one."""
        return [self.checkpoint] + ([self.baseline] if self.baseline else [])

    def source(self, name: str) -> Source:
        revision = self.revision if name == self.checkpoint else self.baseline_revision
        return open_source(name, self.trust_remote_code, revision)

    def open(self, source: Source, together: int = 1) -> Backend:
        """A backend for `source`; `together` is the number of models in memory at once."""
        device, dtype = check_device(self.device), DTYPES[self.dtype]
        name = choose_backend(source, device, dtype, together) if self.backend == "auto" else self.backend
        return open_backend(name, source, device, dtype)

    @property
    def library(self) -> Library:
        return Library(kept_in() if self.keep else None, self.note)

    @contextmanager
    def watched(self, *backends: Backend) -> Iterator[OnStep]:
        """A context that reports the progress of `backends`; yields the callback for their steps."""
        title = " and ".join(backend.source.name for backend in backends)
        self.progress(Step(title, 0, None))
        for backend in backends:
            backend.on_block = lambda done, total: self.progress(Step(f"{title}, by block", done, total))
        yield lambda done, total: self.progress(Step(title, done, total))

    def note(self, text: str) -> None:
        """Report `text` to the progress callback."""
        self.progress(Note(text))

    def note_text(self, cut: Cut, read: Reading | None) -> None:
        """Report skipped rows, and a missing BOS that changes the numbers."""
        if text := read and read.describe():
            self.note(text)
        if cut.begun:
            self.note(
                "this model's tokenizer puts BOS before each text, but only the first window has one; --bos every "
                "gives it to every window, which is how such a model is used and calibrated"
            )

    def finish(self, row: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return `row`. With `store`, also write `rows` (default: [row]) into the checkpoint."""
        if self.store:
            stored = [self._shareable(each | {"version": __version__}) for each in rows or [row]]
            store(self.source(self.checkpoint).directory, stored)
        return row

    def _shareable(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` with bare file names: a published checkpoint must not show local paths."""
        labels = {name: Path(name).resolve().name for name in self.models() if Path(name).is_dir()}
        shown = dict(row)
        if isinstance(row.get("baseline"), dict):
            shown["baseline"] = self._shareable(row["baseline"])
        if "model" in shown:
            shown["model"] = labels.get(shown["model"], shown["model"])
        for key in ("text", "problems"):
            if key in shown:
                shown[key] = HELDOUT if shown[key] == "builtin" else Path(shown[key]).name
        return shown


def kept_in() -> Path:
    """The cache directory for finished windows."""
    return cache_dir() / "evaluations"


def make_session(checkpoint: str | Path, baseline: str | Path | None, options: dict[str, Any]) -> Session:
    """The session for these keywords of Setup. UsageError for an unknown keyword, with the nearest known one."""
    known = [field.name for field in fields(Session)][2:]
    for key in options:
        if key not in known:
            raise UsageError(f"unknown option {key!r}; {nearest(key, [*known, *TextSetup.__annotations__])}")
    session = Session(str(checkpoint), None if baseline is None else str(baseline), **options)
    for what, value, choices in (
        ("--backend", session.backend, ("auto", *BACKENDS)),
        ("--dtype", session.dtype, DTYPES),
    ):
        if value not in choices:
            raise UsageError(f"{what} {value!r}: {nearest(value, choices)}")
    if session.store:
        refuse_to_write_into(model_directory(session.checkpoint, session.trust_remote_code, session.revision))
    reason = reason_against(kept_in()) if session.keep else None
    if reason is None:
        return session
    session.note(f"{kept_in()}: {reason}; what is finished is not kept")
    return replace(session, keep=False)


def split_text(options: dict[str, Any]) -> tuple[Text, dict[str, Any]]:
    """The keywords of Text, and all other keywords."""
    names = {field.name for field in fields(Text)}
    text = Text(**{key: value for key, value in options.items() if key in names})
    return text, {key: value for key, value in options.items() if key not in names}


def reason_against(directory: Path) -> str | None:
    """The reason why `directory` cannot be written, or None. Creates it if it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(directory, os.W_OK) else "it cannot be written to"
