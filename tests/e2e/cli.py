"""The console scripts, run in this process through the same entry points that pip installs."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowbit.commands import lowbit, quantize, quantize_convert, quantize_eval, quantize_inspect, quantize_report


@dataclass(frozen=True)
class Outcome:
    """A finished command: its exit status and output."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of an error; fails where there are more, or a traceback."""
        assert self.code not in (0, None), self.out
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        return lines[0]


def run_lowbit(*args: object) -> Outcome:
    """`lowbit ARGS`."""
    return _run(lowbit.main, "lowbit", args)


def run_quantize(*args: object) -> Outcome:
    """`quantize ARGS`."""
    return _run(quantize.main, "quantize", args)


def run_quantize_eval(*args: object) -> Outcome:
    """`quantize-eval ARGS`."""
    return _run(quantize_eval.main, "quantize-eval", args)


def run_quantize_convert(*args: object) -> Outcome:
    """`quantize-convert ARGS`."""
    return _run(quantize_convert.main, "quantize-convert", args)


def run_quantize_inspect(*args: object) -> Outcome:
    """`quantize-inspect ARGS`."""
    return _run(quantize_inspect.main, "quantize-inspect", args)


def run_quantize_report(*args: object) -> Outcome:
    """`quantize-report ARGS`."""
    return _run(quantize_report.main, "quantize-report", args)


def _run(main: Callable[[], None], name: str, args: tuple[object, ...]) -> Outcome:
    patch = pytest.MonkeyPatch()
    handler = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    try:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        patch.undo()
        signal.signal(signal.SIGTERM, handler)
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def names(directory: Path) -> list[str]:
    """The names in a directory, including hidden ones."""
    return sorted(path.name for path in directory.iterdir())
