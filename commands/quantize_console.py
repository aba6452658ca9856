"""Output of `quantize`: the events of a run as lines, and a table at the end."""

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from lowbit.api.drafting import Tuned
from lowbit.api.quantizing import BlockDone, Calibrated, Checked, Completed, Event, Planned, Quantized, Stage
from lowbit.api.shared import Note
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.free import FreeJob
from lowbit.calibrate.job import Job
from lowbit.calibrate.mixtures import Mixed
from lowbit.calibrate.report import TUNING_STEP, BlockReport, peak_memory
from lowbit.commands.common import say
from lowbit.commands.display import Display, clock, left_of
from lowbit.commands.push import describe_pushed
from lowbit.evaluation.perplexity import describe_difference
from lowbit.export.convert import command_for_llama_cpp
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.llama_cpp import LLAMA_CPP
from lowbit.export.engines.lowbit import LOWBIT
from lowbit.export.engines.table import engines_for
from lowbit.export.engines.verdicts import describe
from lowbit.export.engines.vllm import VLLM
from lowbit.export.escape import one_line
from lowbit.export.formats import describe_schemes
from lowbit.progress import Part, Step
from lowbit.quant.scheme import name_of

MOST_LEFT = 8
WAYS = {  # to load a checkpoint
    LOWBIT.name: "lowbit generate {} --chat",
    VLLM.name: "vllm serve {}",
    LLAMA_CPP.name: "llama-cli -m {head}",
}


class Printer:
    """Prints each event of a run as it arrives; stages, steps and parts go to the display."""

    def __init__(self, display: Display, verbose: bool = False, dry_run: bool = False) -> None:
        self.display, self.console, self.verbose, self.dry_run = display, display.console, verbose, dry_run
        self.begun, self.tuned = time.monotonic(), 0

    def __enter__(self) -> "Printer":
        self.display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.display.__exit__(*error)

    def __call__(self, event: Event) -> None:
        match event:
            case Completed(recipe):
                self.tuned = recipe.distill_steps
                self.display.emit("recipe", asdict(recipe))
                if self.dry_run:  # otherwise it is stored with the weights
                    self.display.line(recipe.to_toml(), end="")
            case Planned(job):
                self.display.peak = partial(peak_memory, job.device)
                self.plan(job)
                if job.mixture is not None:
                    self.mixture(job.mixture)
            case Calibrated(calibration):
                self.readings(calibration)
            case Stage(text):
                self.begun = time.monotonic()
                self.display(Step(text, 0, None))
            case Checked(done, total):
                self.display(Step("checking the model's files, MB", done // 10**6, total // 10**6))
            case BlockDone():
                self.block(event)
            case Note():
                self.note(event)
            case Step() | Part():
                self.display(event)

    def note(self, note: Note) -> None:
        """A note, or a warning on stderr."""
        self.display.emit("note", vars(note))
        if note.warning:
            say(f"Warning: {one_line(note.text)}", err=True)
        else:
            self.display.line(f"  note: {note.text}")

    def plan(self, job: Job | FreeJob) -> None:
        """Print schemes, linears left in 16 bits with the reason, and limits of other engines."""
        exempt = sum(left.exempt for left in job.plan.left.values())
        before, after = (f"{nbytes / 1e6:.1f} MB" for nbytes in (job.source.checkpoint.nbytes, job.output_bytes()))
        self.lines(
            "plan",
            describe_schemes(job.plan.schemes),
            f"{before} -> {after}, coverage {job.plan.coverage:.2%}",
            f"{len(job.plan.left)} linears left in 16 bits, {exempt} of them on purpose",
        )
        for weight in job.plan.vocabulary:
            self.display.line(f"  {weight.name}: {weight.scheme}, {weight.n} x {weight.k}{weight.fallback}")
        if job.plan.attentions:
            self.display.line(f"  keys and values: {job.recipe.kv_cache}, {len(job.plan.attentions)} attentions")
        for name, left in list(job.plan.left.items())[:MOST_LEFT]:
            self.display.line(f"  left {name}: {left.reason}")
        self.kinds("fallback", job.plan.fallbacks)
        self.kinds("not for tensor parallelism", job.plan.uncut)
        for warning in job.warnings():
            self.display.line(f"  note: {warning}")
        self.engines(job)

    def engines(self, job: Job | FreeJob) -> None:
        """Print the way in which each engine that opens the result will run it, and the way into llama.cpp."""
        verdicts = job.verdicts()
        for engine in engines_for(job.format):
            self.display.line(f"  {engine.name} {engine.version}: {describe(verdicts[engine.name])}")
        this = (job.format, job.plan.written, job.shapes, job.source.checkpoint, job.recipe.kv_cache)
        command = command_for_llama_cpp(*this)
        if command is not None:
            self.display.line(f"  {LLAMA_CPP.name}: the same weights after {command}")

    def kinds(self, what: str, reasons: Mapping[str, str]) -> None:
        """Print reasons by linear, a line for each kind of linear: names that differ in numbers alone."""
        found = Counter((re.sub(r"\.\d+(?=\.)", ".*", name), reason) for name, reason in reasons.items())
        for (kind, reason), count in found.items():
            self.display.line(f"  {what}, {count} x {kind}: {reason}")

    def mixture(self, mixture: Mixed) -> None:
        """Print the schemes that a budget was spent on, by kind of linear, and the divergence expected of each."""
        self.display.emit("mixture", mixture.as_json())
        table = Table(title="the budget, spent", title_justify="left")
        for column in ("linears", "scheme", "sets", "nats a token"):
            table.add_column(column)
        kinds: dict[tuple[str, str], list[float]] = {}
        for key, option in mixture.chosen.items():
            kind = re.sub(r"\.\d+\.", ".*.", key)
            kinds.setdefault((kind, name_of(option.scheme)), []).append(option.divergence)
        for (kind, scheme), costs in sorted(kinds.items()):
            table.add_row(kind, scheme, str(len(costs)), f"{sum(costs):.5f}")
        self.display.line(table)
        self.display.line(
            f"  {mixture.reached:.6g} {mixture.unit}; {mixture.target:.6g} allowed, {mixture.least:.6g} possible; "
            f"expected divergence {mixture.divergence:.4f} +- {mixture.error:.4f} nats a token with plain rounding"
        )

    def lines(self, word: str, *texts: str) -> None:
        """Print lines in a column beside `word`."""
        for text in texts:
            self.display.line(Text.assemble((f"{word:<7}", "bold"), text))
            word = ""

    def readings(self, calibration: CalibrationSet) -> None:
        """Print counts of skipped or folded calibration rows; with --verbose, each row."""
        if calibration.seen:
            taken = sum(sample.nbytes for sample in calibration.seen)
            self.display.line(f"  note: calibrated on {calibration.source}; images take {taken / 1e9:.2f} GB of memory")
        for reading in calibration.readings:
            if text := reading.describe():
                self.display.line(f"  note: {text}")
            for line in reading.skipped if self.verbose else ():
                self.display.line(f"  {reading.label}, {line}")

    def block(self, event: BlockDone) -> None:
        """A finished block: its loss, time, and time left; after the first one, an estimate for all."""
        report, done = event.report, event.report.index + 1
        self.display.emit("block", {"total": event.total} | asdict(report))
        left = left_of(time.monotonic() - self.begun, done, event.total) or 0.0
        loss = "" if report.loss is None else f"loss {report.loss:.5f}  "
        peak = f"peak {report.peak_bytes / 1e9:.2f} GB"
        self.display(Step("quantizing", done, event.total))
        self.display.line(f"block {done:3}/{event.total}  {loss}{report.seconds:6.1f} s  left {clock(left)}  {peak}")
        if done == 1:
            self.estimate(report, event.total)

    def estimate(self, report: BlockReport, total: int) -> None:
        """The expected time of all blocks and of tuning, from the first block's `report`."""
        phases = dict(report.phases)
        tuning = self.tuned * phases.pop(TUNING_STEP, 0.0)
        blocks = total * (sum(phases.values()) or report.seconds)
        self.display.emit("estimate", {"blocks_seconds": round(blocks, 1), "tuning_seconds": round(tuning, 1)})
        steps = f", {clock(tuning)} for tuning" if self.tuned else ""
        self.display.line(f"  about {clock(blocks)} for blocks{steps}, estimated from the first block")

    def result(self, done: Quantized) -> None:
        """Print the output, sizes and scores before and after, and the way to load it."""
        self.display.stop()
        self.display.emit("done", result_row(done))
        table = Table(title=str(done.output), title_justify="left")
        for column in ("", "original", "quantized"):
            table.add_column(column)
        table.add_row("weights", f"{done.source_bytes / 1e6:.1f} MB", f"{done.output_bytes / 1e6:.1f} MB")
        if done.scores:
            before, after = done.scores
            table.add_row("perplexity", f"{before.perplexity:.4f}", f"{after.perplexity:.4f}")
            table.add_row("loss, nats", f"{before.nll:.5f}", f"{after.nll:.5f} ({describe_difference(before, after)})")
        for row in done.rows:
            if row["evaluation"] == "divergence":
                told = f"{row['kl_mean']:.4f}, the same most likely token at {row['top1_agreement']:.1%}"
                table.add_row("KL, nats", "0", told)
        self.display.line(table)
        if done.scores:
            tokens, context = done.scores[0].tokens, done.scores[0].context
            self.display.line(f"{tokens} tokens of builtin held-out text, {context} a window, float32")
        self.display.line(f"{done.recipe.method}, {describe_schemes(done.plan.schemes)}, in {clock(done.seconds)}")
        self.lines("use", *(ways_to_load(done) or ["no engine has kernels for all of it: see the model card"]))
        if done.output is not None and done.output.is_dir():
            page = [f"{done.output}/report.html"] if done.scores else []
            self.lines("look", *page, f"{done.output}/README.md", f"{done.output}/recipe.toml")
        if done.pushed is not None:
            self.display.line(describe_pushed(done.pushed))

    def drafter(self, tuned: Tuned) -> None:
        """Print what the tuned drafter writes in a step."""
        self.display.emit("drafter", tuned.row | {"output": None if tuned.output is None else str(tuned.output)})
        place = tuned.output or "not written: use the drafter as it is"
        self.lines("drafts", f"{tuned.after:.3f} tokens a step, {tuned.before:.3f} before tuning; {place}")


def ways_to_load(done: Quantized) -> list[str]:
    """A command for each engine that loads the output, a directory or a file."""
    output = done.output
    assert output is not None
    head = output / FORMATS[done.recipe.format].container.head if output.is_dir() else output
    return [way.format(output, head=head) for engine, way in WAYS.items() if engine in done.readers]


def result_row(done: Quantized) -> dict[str, Any]:
    """A finished run as JSON values."""
    return {
        "output": str(done.output),
        "source_bytes": done.source_bytes,
        "output_bytes": done.output_bytes,
        "scores": [score.as_json() for score in done.scores],
        "rows": list(done.rows),
        "warnings": list(done.warnings),
        "seconds": round(done.seconds, 1),
        "pushed": None if done.pushed is None else vars(done.pushed),
    }
