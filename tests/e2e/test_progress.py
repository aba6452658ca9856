"""One display through a whole run: recorded at two widths, as plain lines, as JSON, and silent."""

import io
import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.commands import display as module
from lowbit.commands.common import Terminal
from lowbit.commands.display import Display, clock, left_of
from lowbit.commands.quantize_console import Printer
from lowbit.progress import Part, Step, tell, watched_by
from tests.builders import save_family
from tests.e2e.cli import run_quantize, run_quantize_eval

LEARNED: dict[str, Any] = {"method": "best", "group_size": 32, "iters": 2, "distill_steps": 2}
LEARNED |= {"num_samples": 4, "seqlen": 64, "eval_windows": 1}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
UP = re.compile(r"\x1b\[\d*A")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("source") / "a-model-with-quite-a-long-name-as-many-have")


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_of_a_recording_wraps(source, tmp_path, width) -> None:
    recorded = io.StringIO()
    console = Terminal(file=recorded, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with Printer(Display(console=console)) as printer:
        printer.display.bar.live.auto_refresh = False  # each event is drawn, and nothing between
        printer.result(lowbit.quantize(source, tmp_path / "out", progress=drawn(printer), **LEARNED))
    text = recorded.getvalue()
    lines = [CONTROL.sub("", line) for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    for stage in ("quantizing", "tuning scales", "reading the files", "scoring the original", "continuing prompts"):
        assert stage in shown
    parts = ("learned rounding, 1 of 2", "structure", "writing model.layers.1", "backward through blocks, 2 of 2")
    for part in parts:
        assert part in shown
    assert re.search(r"about \d:\d\d for blocks, \d:\d\d for tuning, estimated from the first block", shown)
    assert re.search(r"quantizing +0/2 0:", shown)  # blocks are counted from the first on
    assert re.search(r"quantizing +\S+ +1/2 0:00:\d\d left \d:\d\d \d+\.\d\d GB", shown)
    assert UP.search(text)  # redrawn in place


def drawn(printer: Printer) -> Any:
    def show(event: Any) -> None:
        printer(event)
        printer.display.bar.refresh()

    return show


def test_the_end_says_what_was_made_where_and_how_to_load_it(source, tmp_path) -> None:
    out = tmp_path / "out"
    done = run_quantize(source, "--method", "rtn", "--group-size", 32, "--eval-windows", 1, "-o", out)
    assert done.code == 0, done.err
    assert "rounder =" not in done.out
    ending = done.out[done.out.index("original") :]
    for said in (
        "rtn, int4-g32 (14 linears)",
        f"lowbit generate {out} --chat",
        f"vllm serve {out}",
        f"{out}/report.html",
    ):
        assert said in ending
    planned = run_quantize(source, "--method", "rtn", "--group-size", 32, "--dry-run")
    assert 'rounder = "rtn"' in planned.out


def test_without_a_terminal_a_line_comes_before_long(monkeypatch, capsys) -> None:
    monkeypatch.setattr(module, "EVERY", 0.05)
    with Display() as display:
        display(Step("quantizing", 1, 4))
        display(Part("learned rounding", 3, 200))
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert re.fullmatch(
        r"quantizing 1/4: learned rounding, 3 of 200; 0:00 so far, left 0:00; peak \d+\.\d\d GB", lines[0]
    )


class Timed(io.StringIO):
    """Text with the time of each write."""

    def __init__(self) -> None:
        super().__init__()
        self.times = [time.monotonic()]

    def write(self, text: str) -> int:
        self.times.append(time.monotonic())
        return super().write(text)


def test_a_whole_run_without_a_terminal_is_never_silent_for_long(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.02)  # a quick machine tunes in less than a fifth of a second
    recorded = Timed()
    monkeypatch.setattr("sys.stdout", recorded)
    monkeypatch.setattr("sys.stderr", recorded)
    with Printer(Display()) as printer:
        printer.result(lowbit.quantize(source, tmp_path / "out", progress=printer, **LEARNED))
    gaps = [after - before for before, after in pairwise(recorded.times)]
    assert max(gaps) < 5  # seconds that another process may take on a busy machine
    assert "tuning scales and norms" in recorded.getvalue()
    assert "\x1b" not in recorded.getvalue()


def test_quiet_prints_nothing_and_json_only_events(source, tmp_path) -> None:
    flags = ("--method", "rtn", "--group-size", 32, "--eval-windows", 1)
    quiet = run_quantize(source, *flags, "-o", tmp_path / "quiet", "--quiet")
    assert (quiet.code, quiet.out) == (0, "")
    told = run_quantize(source, *flags, "-o", tmp_path / "json", "--json")
    events = [json.loads(line) for line in told.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "recipe"
    assert kinds[-1] == "done"
    assert kinds.count("block") == 2
    assert {"step", "part"} < set(kinds)
    assert events[-1]["output"] == str(tmp_path / "json")
    assert (tmp_path / "json" / "config.json").exists()


def test_an_evaluation_is_quiet_but_for_its_row(source) -> None:
    flags = ("perplexity", source, "--windows", 1, "--context", 64, "--no-keep")
    quiet = run_quantize_eval(*flags, "--quiet")
    [line] = quiet.out.splitlines()
    told = [json.loads(line) for line in run_quantize_eval(*flags, "--json").out.splitlines()]
    assert [event.get("event") for event in told][-2:] == ["scored", None]
    assert told[-1] == json.loads(line)


def test_who_works_need_not_know_who_watches() -> None:
    told: list[Step | Part] = []
    tell(Part("unseen"))
    with watched_by(told.append):
        tell(Step("work", 1, 2))
    tell(Part("unseen"))
    assert told == [Step("work", 1, 2)]


def test_times_are_read_as_a_clock() -> None:
    assert [clock(seconds) for seconds in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]
    assert left_of(10.0, 2, 8) == 30.0
    assert left_of(10.0, 0, 8) is None
