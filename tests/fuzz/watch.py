"""The effect of one input: an exception, too much time, or too much memory."""

import json
import os
import resource
import shutil
import signal
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import TARGETS, Files, attempt, honest

SECONDS = 10  # of processor: a loaded machine makes no hang
PATIENCE = 60  # seconds of waiting
BYTES = 1 << 30
GIVEN = 6 << 30  # beyond what the process has: an allocation of more fails, and is a finding by its error


class Hang(BaseException):
    """More than SECONDS of processor, or PATIENCE."""


class Watch:
    """Runs inputs of one target, counts them, and keeps one of each kind of finding.

    name      the target
    work      where honest models and the input at work lie
    findings  where findings are kept
    """

    def __init__(self, name: str, work: Path, findings: Path) -> None:
        self.name, self._target, self._work, self._findings = name, TARGETS[name], work, findings
        self._start = _processor()
        self.count = 0
        self.kinds: Counter[str] = Counter()
        self.most_bytes = 0
        signal.signal(signal.SIGPROF, _hang)
        signal.signal(signal.SIGALRM, _hang)
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + GIVEN, resource.RLIM_INFINITY))

    def attempt(self, model: str, files: Files) -> None:
        """Run one input; whatever it brings to light is kept, not raised."""
        self.count += 1
        place = self._work / "at-work"
        shutil.rmtree(place, ignore_errors=True)
        self._note(model, files)
        _forget_peak()
        before = _memory("VmRSS")
        _limit(SECONDS, PATIENCE)
        try:
            attempt(self._target, honest(self.name, self._work / "honest")[model], files, place)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # findings are of every kind
            self._keep(_kind_of(error), "".join(traceback.format_exception(error)))
        finally:
            _limit(0, 0)
        taken = _memory("VmHWM") - before
        self.most_bytes = max(self.most_bytes, taken)
        if taken > BYTES:
            self._keep(f"memory {taken >> 20} MiB"[:8], f"{taken >> 20} MiB")

    def _note(self, model: str, files: Files) -> None:
        """Leave the input at hand, should the process die of it."""
        last = self._findings / f"{self.name}-last"
        shutil.rmtree(last, ignore_errors=True)
        last.mkdir(parents=True)
        (last / "model").write_text(model)
        for name, content in files.items():
            (last / name).write_bytes(content)

    def _keep(self, kind: str, story: str) -> None:
        self.kinds[kind] += 1
        if self.kinds[kind] == 1:
            kept = self._findings / f"{self.name}-{''.join(c if c.isalnum() else '-' for c in kind)[:80]}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self._findings / f"{self.name}-last", kept)
            (kept / "story").write_text(story)

    def summary(self) -> str:
        """One line of JSON: minutes of processor, inputs, the most memory beyond what was there, findings by kind."""
        facts: dict[str, object] = {"target": self.name, "minutes": round((_processor() - self._start) / 60, 2)}
        return json.dumps(facts | {"inputs": self.count, "most_MiB": self.most_bytes >> 20, "findings": self.kinds})


def _limit(processor: float, wall: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, processor)
    signal.setitimer(signal.ITIMER_REAL, wall)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def _kind_of(error: BaseException) -> str:
    """A key for findings: the error's type, and the innermost line of our code in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "lowbit" in frame.filename] or frames
    last = ours[-1] if ours else None
    return f"{type(error).__name__} {Path(last.filename).name}:{last.lineno}" if last else type(error).__name__


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    return 0


def _processor() -> float:
    """Seconds of processor that this process and its ended children took."""
    return sum(os.times()[:4])


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
