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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from benchmarks.readers import ReaderError, read_by
from calibrate.data import builtin_text
from evaluation.backend import TransformersBackend
from evaluation.text import Cut, Protocol, cut
from models.source import Source, open_source

RESULTS = Path(__file__).parent / "results" / "formats.jsonl"
OURS = "lowbit"


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
        row["error"] = error.last_words
    row |= {"seconds": round(time.monotonic() - begun, 1), "date": time.strftime("%Y-%m-%d")}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def ours(source: Source, windows: Cut) -> list[list[float]]:
    """Log-probabilities by our own reading."""
    batches = TransformersBackend(source, "cpu").log_likelihoods(w.unsqueeze(0) for w in windows.windows)
    return [batch[0].tolist() for batch in batches]


def theirs(python: str, kind: str, directory: str, windows: Cut) -> list[list[float]]:
    """Log-probabilities by another program. ReaderError where it fails."""
    return read_by(python, kind, directory, [window.tolist() for window in windows.windows])


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Markdown: a line for each checkpoint, a column for each reader; readers and errors are spelled out below."""
    cells = {(row["checkpoint"], row["reader"]): row for row in rows}
    checkpoints = sorted({checkpoint for checkpoint, _ in cells})
    readers = list(dict.fromkeys(reader for _, reader in cells))
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
