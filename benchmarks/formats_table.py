"""The table of docs/FORMATS.md: every checkpoint through every reader.

    python -m benchmarks.formats_table --checkpoint "awq int4-g64, gptq=DIR" ... \\
        --reader "vLLM 0.32, CPU=PYTHON:vllm" ... [--text FILE] [--windows 4] [--context 256]

A checkpoint is a label and a directory. A reader is a label, a Python that has the program, and what
benchmarks/peers/read_checkpoint.py calls it. The first column is always our own reading: weights dequantized, all else
in float32, activations not quantized. A cell is the perplexity, or the reader's own error. Rows are added to
benchmarks/results/formats.jsonl; the table that is printed is made from the newest row of each pair there, so without
arguments nothing is measured.
"""

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from calibrate.data import builtin_text
from evaluation.backend import TransformersBackend
from evaluation.text import Cut, Protocol, cut
from models.source import Source, open_source

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "formats.jsonl"
READ_CHECKPOINT = HERE / "peers" / "read_checkpoint.py"
OURS = "lowbit"
LONGEST_ERROR = 100


def main() -> None:
    args = parse()
    text = args.text.read_text(encoding="utf-8") if args.text else builtin_text("heldout")
    for label, directory in args.checkpoint:
        source = open_source(directory)
        windows = cut(text, source, Protocol(args.context, windows=args.windows))
        keep(label, OURS, lambda s=source, w=windows: ours(s, w))
        for reader, target in args.reader:
            python, _, kind = target.rpartition(":")
            keep(label, reader, lambda p=python, k=kind, d=directory, w=windows: theirs(p, k, d, w))
    print_table([json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="every checkpoint through every reader")
    parser.add_argument("--checkpoint", action="append", default=[], type=pair, help="LABEL=DIR")
    parser.add_argument("--reader", action="append", default=[], type=pair, help="LABEL=PYTHON:KIND")
    parser.add_argument("--text", type=Path, help="UTF-8 text; without it, held-out Python documentation")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    return parser.parse_args()


def pair(text: str) -> tuple[str, str]:
    """LABEL and VALUE of LABEL=VALUE; the label may hold anything but =."""
    label, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=VALUE")
    return label, value


def keep(label: str, reader: str, measure: Callable[[], list[list[float]]]) -> None:
    """Measure one pair and add its row to the results."""
    begun = time.monotonic()
    row = {"checkpoint": label, "reader": reader, "perplexity": None, "tokens": 0, "error": None}
    try:
        tokens = [value for window in measure() for value in window]
        row |= {"perplexity": round(math.exp(-sum(tokens) / len(tokens)), 4), "tokens": len(tokens)}
    except ReaderError as error:
        row["error"] = str(error)
    row |= {"seconds": round(time.monotonic() - begun, 1), "date": time.strftime("%Y-%m-%d")}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


class ReaderError(Exception):
    """What a reader said when it failed."""


def ours(source: Source, windows: Cut) -> list[list[float]]:
    """Log-probabilities by our own reading."""
    batches = TransformersBackend(source, "cpu").log_likelihoods(w.unsqueeze(0) for w in windows.windows)
    return [batch[0].tolist() for batch in batches]


def theirs(python: str, kind: str, directory: str, windows: Cut) -> list[list[float]]:
    """Log-probabilities by another program. ReaderError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "windows.json", Path(scratch) / "out.json"
        given.write_text(json.dumps([window.tolist() for window in windows.windows]))
        command = [python, str(READ_CHECKPOINT), kind, directory, "--windows", str(given), "--out", str(found)]
        environment = os.environ | ({"PYTHONPATH": path_of_ours(scratch)} if kind.endswith("-lowbit") else {})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=scratch)
        if done.returncode or not found.exists():
            raise ReaderError(last_words(done.stdout + done.stderr))
        return json.loads(found.read_text())


def path_of_ours(scratch: str) -> str:
    """A path on which another Python finds this checkout, and its entry point for vLLM."""
    info = Path(scratch) / "lowbit-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lowbit\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nlowbit = integrations.vllm:register\n")
    return os.pathsep.join([scratch, str(HERE.parent)])


def last_words(output: str) -> str:
    """The last exception of a traceback on one line, shortened."""
    errors = re.findall(
        r"^(?:\(.*?\) *)?(?:ERROR .*?\] )?((?:\w+\.)*\w*(?:Error|Exception|Warning)\b: .+)$", output, re.M
    )
    known = [error for error in errors if "initialization failed" not in error]  # vLLM's processes repeat the news
    told = re.findall(r"^ +Value error, (.+?)(?: \[type=.*)?$", output, re.M)  # pydantic's reason is a line further on
    line = (told or known or errors or output.strip().splitlines() or ["no output"])[-1].strip()
    line = re.sub(r"/\S*/", "", line)
    return line if len(line) <= LONGEST_ERROR else line[: LONGEST_ERROR - 3] + "..."


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Markdown: a line for each checkpoint, a column for each reader; readers and errors are spelled out below."""
    cells = {(row["checkpoint"], row["reader"]): row for row in rows}
    checkpoints, readers = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    errors = list(dict.fromkeys(row["error"] for row in cells.values() if row["error"]))

    def text(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return ""
        return f"error {errors.index(row['error']) + 1}" if row["error"] else f"{row['perplexity']:.3f}"

    lines = [[name, *(text(cells.get((name, reader))) for reader in readers)] for name in checkpoints]
    for line in (["checkpoint", *ascii_uppercase[: len(readers)]], ["---"] * (len(readers) + 1), *lines):
        print("| " + " | ".join(line) + " |")
    print()
    for letter, reader in zip(ascii_uppercase, readers, strict=False):
        print(f"- {letter}: {reader}")
    for number, error in enumerate(errors, 1):
        print(f"- error {number}: {error.replace('`', chr(39))}")


if __name__ == "__main__":
    main()
