"""The display of a long command: a live bar on a terminal, elsewhere a line at least every 30 seconds."""

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from lowbit.calibrate import ranks
from lowbit.commands.common import Terminal, make_console, say
from lowbit.commands.parts import flag
from lowbit.progress import Part, Step

EVERY = 30.0  # most seconds between two lines
# Passed to Display as its first arguments.
OUTPUT_OPTIONS = (
    flag("--quiet", "-q", text="Print warnings and errors alone."),
    flag("--json", "as_json", text="Print JSON alone, one event a line."),
)


class Left(ProgressColumn):
    """Time left in a stage, from the mean of its steps so far."""

    def render(self, task: Task) -> Text:
        """`left 1:05`; empty before the first step is done."""
        left = left_of(task.elapsed or 0.0, int(task.completed), task.total)
        return Text("" if left is None else f"left {clock(left)}")


class Bar(Progress):
    """A line with stage, bar, steps, times and memory, and one with the current part of the step. Neither ever
    wraps."""

    def __init__(self, console: Console) -> None:
        self.part = ""
        stage = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        memory = TextColumn("{task.fields[peak]}", table_column=Column(no_wrap=True))
        columns = (stage, BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn(), Left(), memory)
        super().__init__(*columns, console=console, transient=True, refresh_per_second=4)

    def get_renderables(self) -> Any:
        """The two lines."""
        yield self.make_tasks_table(self.tasks)
        if self.part:
            yield Text(f"  {self.part}", style="dim", no_wrap=True, overflow="ellipsis")


class Display:
    """Shows stages, steps and parts, and prints lines between them. Only the leading rank does.

    console  where lines go; the bar goes there too, or to stderr if only that is a terminal
    peak     peak memory in bytes
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, console: Terminal | None = None) -> None:
        leads = ranks.leads()
        self.as_json = as_json and leads
        self.console = console or make_console(quiet or as_json)
        live = self.console if self.console.is_terminal else Terminal(file=sys.stderr)
        shows = leads and live.is_terminal and not (quiet or as_json)
        self.bar = Bar(live) if shows else None
        self.peak: Callable[[], int] = peak_of_process
        self._beats = leads and not quiet and self.bar is None
        self._step, self._part = Step("", 0, None), Part("")
        self._begun = self._spoke = time.monotonic()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Display":
        if self._beats:
            self._beating.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._ended.set()
        if self._beats:
            self._beating.join()  # no line comes after the end

    def __call__(self, event: Step | Part) -> None:
        """Show `event`."""
        if isinstance(event, Part):
            self._part = event
        else:
            if event.title != self._step.title:
                self._begun = time.monotonic()
            self._step, self._part = event, Part("")
        if self.as_json:
            self.emit(type(event).__name__.lower(), vars(event))
        if self.bar is not None and self._step.title:
            self._draw(self.bar)

    def line(self, text: RenderableType, **how: Any) -> None:
        """Print a line, or a table."""
        self._spoke = time.monotonic()
        self.console.print(text, **how)

    def emit(self, kind: str, values: dict[str, Any]) -> None:
        """Print an event as a line of JSON, if the command's output is JSON."""
        if self.as_json:
            self._spoke = time.monotonic()
            click.echo(json.dumps({"event": kind} | values))

    def stop(self) -> None:
        """Remove the bar until the next step."""
        if self.bar is not None:
            self.bar.stop()

    def _draw(self, bar: Bar) -> None:
        step = self._step
        if not bar.tasks or bar.tasks[0].description != step.title:
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(step.title, total=step.total, peak="")
        bar.part = describe_part(self._part)
        bar.update(bar.task_ids[0], completed=step.done, total=step.total, peak=f"{self.peak() / 1e9:.2f} GB")
        bar.start()

    def _beat(self) -> None:
        """Until the end, print the state of the work whenever nothing was printed for EVERY seconds."""
        while not self._ended.wait(max(self._spoke + EVERY - time.monotonic(), EVERY / 30)):
            if time.monotonic() - self._spoke >= EVERY and self._step.title:
                if self.as_json:
                    self.emit("step", vars(self._step))
                else:
                    self._spoke = time.monotonic()
                    say(self.describe(), err=True)

    def describe(self) -> str:
        """The state of the work, as a line."""
        step, elapsed = self._step, time.monotonic() - self._begun
        count = f" {step.done}/{step.total}" if step.total else ""
        part = describe_part(self._part)
        left = left_of(elapsed, step.done, step.total)
        times = f"{clock(elapsed)} so far" + ("" if left is None else f", left {clock(left)}")
        return f"{step.title}{count}{': ' if part else ''}{part}; {times}; peak {self.peak() / 1e9:.2f} GB"


def describe_part(part: Part) -> str:
    """`learning to round, 120 of 200`."""
    return f"{part.text}, {part.done} of {part.total}" if part.total else part.text


def left_of(elapsed: float, done: int, total: float | None) -> float | None:
    """Seconds left of a stage after `elapsed` seconds; None before a step is done."""
    return elapsed / done * (total - done) if done and total else None


def clock(seconds: float) -> str:
    """Minutes and seconds, as 4:05; hours before them, as 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peak_of_process() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
