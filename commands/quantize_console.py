"""Output of `quantize`: the events of a run as lines, and a table at the end."""

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from lowbit.api.quantizing import BlockDone, Calibrated, Checked, Completed, Event, Planned, Quantized, Stage
from lowbit.api.shared import Note
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.job import Job
from lowbit.commands.common import say
from lowbit.commands.push import describe_pushed
from lowbit.evaluation.perplexity import describe_difference
from lowbit.export.escape import one_line
from lowbit.export.formats import describe_schemes

MOST_LEFT = 8


class Printer:
    """Prints each event of a run as it comes. A stage shows a spinner on a terminal."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        self.console, self.verbose = console, verbose
        self.status = Status("", console=console)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self.checking = Progress(*columns, console=console, disable=not console.is_terminal)
        self.begun = time.monotonic()

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, *error: object) -> None:
        self.status.stop()
        self.checking.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Completed(recipe):
                self.console.print("recipe", style="bold")
                self.console.print(recipe.to_toml(), end="")
            case Planned(job, bits):
                self.status.stop()
                self.plan(job, bits)
            case Calibrated(calibration):
                self.readings(calibration)
            case Stage(text):
                self.begun = time.monotonic()
                self.status.update(Text(text))
                self.status.start()
            case Checked():
                self.check(event)
            case BlockDone():
                self.block(event)
            case Note(text, warning):
                if warning:
                    say(f"Warning: {one_line(text)}", err=True)
                else:
                    self.console.print(f"  note: {text}")

    def plan(self, job: Job, bits: float | None) -> None:
        """Print schemes, linears left in 16 bits with the reason, and limits of other engines."""
        exempt = sum(left.exempt for left in job.plan.left.values())
        found = (
            f" {describe_schemes(job.plan.schemes)}; {len(job.plan.left)} left ({exempt} on purpose); "
            f"coverage {job.plan.coverage:.2%}; "
            f"weights {job.source.checkpoint.nbytes / 1e6:.1f} MB -> {job.output_bytes() / 1e6:.1f} MB"
        )
        self.console.print(Text.assemble(("plan", "bold"), found))
        for name, left in list(job.plan.left.items())[:MOST_LEFT]:
            self.console.print(f"  left {name}: {left.reason}")
        for warning in job.warnings():
            self.console.print(f"  note: {warning}")
        if bits is not None:
            self.console.print(f"  {bits:.4f} bits a weight, scales counted; {job.recipe.target_bits} allowed")

    def readings(self, calibration: CalibrationSet) -> None:
        """Print counts of skipped or folded calibration rows; with --verbose, each row."""
        if calibration.seen:
            self.console.print(f"  note: calibrated on {calibration.source}")
        for reading in calibration.readings:
            if text := reading.describe():
                self.console.print(f"  note: {text}")
            for line in reading.skipped if self.verbose else ():
                self.console.print(f"  {reading.label}, {line}")

    def check(self, event: Checked) -> None:
        """Show the progress of the check of the model's files as a bar on a terminal."""
        if not self.checking.tasks:
            self.status.stop()
            self.checking.start()
            self.checking.add_task("checking the model's files", total=event.total)
        self.checking.update(self.checking.task_ids[0], completed=event.done)
        if event.done == event.total:
            self.checking.stop()

    def block(self, event: BlockDone) -> None:
        """Print a finished block: loss, time, time left and peak memory."""
        report, done = event.report, event.report.index + 1
        left = (time.monotonic() - self.begun) / done * (event.total - done)
        loss = "" if report.loss is None else f"loss {report.loss:.5f}  "
        peak = f"peak {report.peak_bytes / 1e9:.2f} GB"
        self.console.print(f"block {done:3}/{event.total}  {loss}{report.seconds:6.1f} s  left {clock(left)}  {peak}")

    def result(self, done: Quantized) -> None:
        """Print sizes and scores before and after."""
        self.status.stop()
        table = Table(title=str(done.output), title_justify="left")
        for column in ("", "original", "quantized"):
            table.add_column(column)
        table.add_row("weights", f"{done.source_bytes / 1e6:.1f} MB", f"{done.output_bytes / 1e6:.1f} MB")
        if done.scores:
            before, after = done.scores
            table.add_row("perplexity", f"{before.perplexity:.4f}", f"{after.perplexity:.4f}")
            table.add_row("loss, nats", f"{before.nll:.5f}", f"{after.nll:.5f} ({describe_difference(before, after)})")
        self.console.print(table)
        if done.scores:
            tokens, context = done.scores[0].tokens, done.scores[0].context
            self.console.print(f"{tokens} tokens of builtin held-out text, {context} a window, float32")
        self.console.print(f"{clock(done.seconds)} minutes")
        if done.pushed is not None:
            self.console.print(describe_pushed(done.pushed))


def clock(seconds: float) -> str:
    """Minutes and seconds, as 4:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
