"""The table of docs/FORMATS.md: every checkpoint through every reader.

    python -m benchmarks.formats_table --work DIR --peers DIR --commit $(git rev-parse --short HEAD) \\
        [--only REGEX] [--readers REGEX] [--missing]

Creates the demo model's checkpoints that --work lacks, by METHODS and FORMATS (the first format of a method is
quantized, the others are converted), and reads each with the programs of READERS that --peers has. --only and --readers
select by name, --missing skips pairs that have a row. The first reader is our own: weights dequantized, everything else
in float32, activations quantized if the checkpoint says so. A cell is the perplexity, or the reader's own error. Rows
are added to benchmarks/results/formats.jsonl. The printed table has the newest row of each pair there, so without
--work nothing is measured.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from benchmarks.readers import ReaderError, read_by
from benchmarks.tables import readers
from lowbit.calibrate.data import builtin_text
from lowbit.evaluation.backend import TransformersBackend
from lowbit.evaluation.text import Cut, Protocol, cut
from lowbit.models.source import Source, open_source

RESULTS = Path(__file__).parent / "results" / "formats.jsonl"
WINDOWS = Protocol(256, windows=4)
CT = "compressed-tensors"
FEW = {"num_samples": 4, "seqlen": 128}  # enough to show that it loads, not its loss
G64 = {"group_size": 64}
METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "rtn int4-g64": {"method": "rtn", **G64},
    "rtn uint4-g64": {"method": "rtn", "symmetric": False, **G64},
    "awq int4-g64": {"method": "awq", "num_samples": 32, **G64},
    "gptq int4-g64": {"method": "gptq", **G64, **FEW},
    "signround int4-g64": {"method": "signround", "iters": 4, **G64, **FEW},
    "best int4-g64": {"method": "best", "iters": 2, "distill_steps": 2, **G64, **FEW},
    "smoothquant a8token": {"method": "smoothquant", **FEW},
    "smoothquant a8tensor": {"method": "smoothquant", "activations": "tensor", **FEW},
}
SCHEMES = ("fp8", "fp8-a16", "nvfp4-a16", "mxfp4", "mxfp4-a16", "mxfp8")
SCHEMES += ("int2-g64", "int3-g64", "int5-g64", "int6-g64", "int7-g64")
CALIBRATED = ("fp8-static", "nvfp4")  # scales of inputs
METHODS |= {f"rtn {scheme}": {"method": "rtn", "scheme": scheme} for scheme in SCHEMES}
METHODS |= {f"rtn {scheme}": {"method": "rtn", "scheme": scheme, **FEW} for scheme in CALIBRATED}
METHODS |= {
    "rtn int4-a8": {"method": "rtn", "scheme": "int4-g64-a8token"},
    "rtn int4-afp8": {"method": "rtn", "scheme": "int4-g64-afp8token"},
    "int8 head int8": {"method": "int8", "head": "int8", **FEW},
    "int8 cache fp8": {"method": "int8", "kv_cache": "fp8", **FEW},
    "attention-fp8-mlp-nvfp4-a16": {"method": "rtn", "scheme": "attention-fp8-mlp-nvfp4-a16"},
}
BLOCKS = ("rtn fp8-block",)  # of a random model, since blocks of 128 divide no linear of the demo
METHODS |= {name: {"method": "rtn", "scheme": "fp8-block"} for name in BLOCKS}
EVERY = (CT, "gptq", "gptq_v2", "awq")
FORMATS = {
    "int8": EVERY[:2],
    "rtn int4-g64": EVERY,
    "rtn uint4-g64": (CT, "gptq_v2", "awq"),
    "awq int4-g64": EVERY,
    "gptq int4-g64": (CT, "gptq", "awq"),
    "signround int4-g64": (CT, "gptq", "awq"),
    "best int4-g64": (CT, "gptq", "awq"),
    "rtn nvfp4-a16": (CT, "modelopt"),
    "rtn fp8-block": (CT, "fp8"),
}


@dataclass(frozen=True)
class ReaderProgram:
    """A reader: its environment under --peers (none for ours), and its name for read_checkpoint.py."""

    environment: str | None
    kind: str
    formats: tuple[str, ...] = EVERY


def release(package: str) -> str:
    """The first two numbers of an installed package's version."""
    return ".".join(version(package).split(".")[:2])


OURS = "lowbit"
TRANSFORMERS = f"transformers {release('transformers')}"
READERS = {
    f"{TRANSFORMERS}, compressed-tensors {release('compressed-tensors')}": ReaderProgram(
        None, "transformers", (*EVERY, "fp8", "modelopt")
    ),
    "transformers 5.23, gptqmodel 7.7, compressed-tensors 0.17": ReaderProgram("gptqmodel", "transformers"),
    "vLLM 0.32, CPU": ReaderProgram("vllm", "vllm"),
    f"{TRANSFORMERS}, our linears": ReaderProgram(None, "transformers-lowbit"),
    "vLLM 0.32, CPU, our linears": ReaderProgram("vllm", "vllm-lowbit", (CT,)),
    "transformers 5.17, compressed-tensors 0.19": ReaderProgram("llmc", "transformers", (CT,)),
}


def main() -> None:
    args = parse()
    if args.work:
        known = {(row["checkpoint"], row["reader"]) for row in read_rows()} if args.missing else set()
        for label, directory in checkpoints(args.work, args.only):
            source = open_source(str(directory))
            windows = cut(builtin_text("heldout"), source, WINDOWS)
            for reader, measure in measures(args, label, directory, source, windows):
                if (label, reader) not in known and re.search(args.readers, reader):
                    keep({"checkpoint": label, "reader": reader, "commit": args.commit}, measure)
    print(readers(), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="every checkpoint through every reader")
    parser.add_argument("--work", type=Path, help="directory of the checkpoints; without it, only the table is printed")
    parser.add_argument("--peers", type=Path, default=Path("/nowhere"), help="directory of the readers' environments")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", default="", help="checkpoints, a regular expression")
    parser.add_argument("--readers", default="", help="readers, a regular expression")
    parser.add_argument("--missing", action="store_true", help="only pairs without a row")
    return parser.parse_args()


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def checkpoints(work: Path, only: str) -> Iterator[tuple[str, Path]]:
    """Label and directory of each checkpoint whose label matches, created if missing."""
    for method, settings in METHODS.items():
        formats = FORMATS.get(method, (CT,))
        directories = {fmt: work / f"{method}-{fmt}".replace(" ", "-") for fmt in formats}
        for fmt, directory in directories.items():
            if not re.search(only, f"{method}, {fmt}"):
                continue
            first = directories[formats[0]]
            if not first.exists():
                source = random_model(work / "random") if method in BLOCKS else "demo"
                lowbit.quantize(source, first, format=formats[0], eval_windows=0, **settings)
            if not directory.exists():
                lowbit.convert(first, directory, format=fmt)
            yield f"{method}, {fmt}", directory


def random_model(directory: Path) -> Path:
    """A Llama of two blocks with the demo's tokenizer, whose random weights 128 divides. Its outputs are far from
    uniform, so that an error shows."""
    demo = open_source("demo")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "initializer_range": 0.1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=demo.vocabulary, num_hidden_layers=2, **sizes, tie_word_embeddings=True)
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    demo.tokenizer().save_pretrained(directory)
    return directory


def measures(
    args: argparse.Namespace, label: str, directory: Path, source: Source, windows: Cut
) -> Iterator[tuple[str, Callable[[], list[list[float]]]]]:
    """Each available reader that takes the format, with its measuring function."""
    yield OURS, lambda: ours(source, windows)
    for name, reader in READERS.items():
        python = Path(sys.executable)
        if reader.environment:
            python = args.peers / reader.environment / "bin" / "python"
        if python.exists() and label.split(", ")[1] in reader.formats:
            yield name, lambda python=python, kind=reader.kind: theirs(str(python), kind, directory, windows)


def keep(pair: Mapping[str, Any], measure: Callable[[], list[list[float]]]) -> None:
    """Measure one pair and add its row to the results."""
    begun = time.monotonic()
    row = {**pair, "perplexity": None, "tokens": 0, "error": None}
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
    """Log-probabilities by our own reader."""
    batches = TransformersBackend(source, "cpu").log_likelihoods(w.unsqueeze(0) for w in windows.windows)
    return [batch[0].tolist() for batch in batches]


def theirs(python: str, kind: str, directory: Path, windows: Cut) -> list[list[float]]:
    """Log-probabilities by another program. ReaderError if it fails."""
    return read_by(python, kind, directory, [window.tolist() for window in windows.windows])


if __name__ == "__main__":
    main()
