"""What the subcommands of `quantize-eval` share: options, the models they open, a progress bar, where rows go."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lowbit import __version__
from lowbit.calibrate.data import builtin_text
from lowbit.calibrate.documents import SEPARATOR, Reading, documents
from lowbit.calibrate.tables import TABLES, kind_of, local_rows, read_utf8
from lowbit.commands.common import make_console
from lowbit.errors import UsageError
from lowbit.evaluation.after import HELDOUT
from lowbit.evaluation.backend import BACKENDS, Backend, choose_backend, open_backend
from lowbit.evaluation.journal import Library
from lowbit.evaluation.perplexity import OnStep
from lowbit.evaluation.record import record
from lowbit.evaluation.text import Cut
from lowbit.models.demo import cache_dir
from lowbit.models.devices import check_device
from lowbit.models.source import Source, open_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Session:
    """One evaluation: CHECKPOINT, the baseline measured beside it, and how.

    backend  a row of BACKENDS, or auto
    keep     whether finished pieces are kept in the cache and found again
    store    whether the result is also written into the checkpoint
    """

    checkpoint: str
    baseline: str | None
    backend: str
    device: str
    dtype: str
    trust_remote_code: bool
    keep: bool
    store: bool
    console: Console

    def models(self) -> list[str]:
        """The checkpoint, and the baseline where there is one."""
        return [self.checkpoint] + ([self.baseline] if self.baseline else [])

    def source(self, name: str) -> Source:
        return open_source(name, self.trust_remote_code)

    def open(self, source: Source, together: int = 1) -> Backend:
        """A backend for `source`; `together` models have to be in memory at once."""
        device, dtype = check_device(self.device), DTYPES[self.dtype]
        name = choose_backend(source, device, dtype, together) if self.backend == "auto" else self.backend
        return open_backend(name, source, device, dtype)

    @property
    def kept_in(self) -> Path:
        """The directory of what is kept."""
        return cache_dir() / "evaluations"

    @property
    def library(self) -> Library:
        return Library(self.kept_in if self.keep else None)

    @contextmanager
    def progress(self, *backends: Backend) -> Iterator[OnStep]:
        """A bar with the time that is left, on a terminal alone; yields what tells it how far `backends` are."""
        title = " and ".join(backend.source.name for backend in backends)
        shown = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *times, console=shown, transient=True, disable=not shown.is_terminal) as bar:
            task = bar.add_task(title, total=None)
            for backend in backends:
                backend.on_block = lambda done, total: bar.update(task, description=f"{title}: block {done}/{total}")
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def finish(self, row: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> None:
        """Print `row` as the last line; with --record also store it, or `rows` in its place, in the checkpoint."""
        if self.store:
            stored = [self._shareable(each | {"version": __version__}) for each in rows or [row]]
            record(self.source(self.checkpoint).directory, stored)
        click.echo(json.dumps(row))

    def _shareable(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` without the places of files, which are nobody's business in a published checkpoint."""
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


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options and the argument of every subcommand; they arrive as keywords that `make_session` takes."""
    options = (
        click.argument("checkpoint"),
        click.option("--baseline", help="Model measured in the same run: directory, hub id, or demo."),
        click.option(
            "--backend",
            type=click.Choice(["auto", *BACKENDS]),
            default="auto",
            show_default=True,
            help="What computes; auto is transformers, or blocks where memory is short.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
        click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings."),
        click.option("--cache/--no-cache", "keep", default=True, help="Go on where an earlier run stopped."),
        click.option("--record", "store", is_flag=True, help="Also write the result into CHECKPOINT."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def make_session(options: dict[str, Any]) -> Session:
    """The session that the keywords of `session_options` describe; it takes them out of `options`."""
    names = ("checkpoint", "baseline", "backend", "device", "dtype", "trust_remote_code", "keep", "store")
    session = Session(**{name: options.pop(name) for name in names}, console=make_console())
    reason = reason_against(session.kept_in) if session.keep else None
    if reason is None:
        return session
    session.console.print(f"note: {session.kept_in}: {reason}; what is finished is not kept", markup=False)
    return replace(session, keep=False)


def reason_against(directory: Path) -> str | None:
    """Why nothing can be kept in `directory`, which is made where it is missing; or None."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(directory, os.W_OK) else "it cannot be written to"


def read_text(text: str, column: str | None, source: Source) -> tuple[str, Reading | None]:
    """The text that --text names, and what became of the rows of a table, whose chats `source` renders.

    DatasetError where there is no such file.
    """
    path = Path(text)
    if kind_of(text) in TABLES:
        reading = Reading(path.name)
        texts = documents(local_rows(path, None), source.tokenizer(), reading, column)
        return SEPARATOR.join(each.rstrip() for each in texts if each.strip()), reading
    if column is not None:
        raise UsageError(f"--text {text}: plain text has no column {column!r}; leave --text-column out")
    if text == "builtin":
        return builtin_text("heldout"), None
    return read_utf8(path), None


def note_text(session: Session, cut: Cut, read: Reading | None) -> None:
    """Say what a reader of the numbers should know of the text."""
    if text := read and read.describe():
        session.console.print(f"note: {text}", markup=False)
    if cut.begun:
        session.console.print(
            "note: the model's tokenizer puts BOS before a text, and here only the first window has it; --bos every "
            "gives it to all, which is how such a model is used and calibrated"
        )


def row_of(read: Reading | None) -> dict[str, int]:
    """How many rows of a table the text is made of, for the last line."""
    return {"text_rows": read.rows - len(read.skipped), "text_rows_skipped": len(read.skipped)} if read else {}
