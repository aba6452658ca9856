"""Time and memory of `quantize --format gguf`: the demo model, and random weights in a shape of 3 billion parameters.

    python -m benchmarks.bench_gguf_write --models demo llama-3b --scheme q4_0 q4_k_m --cores 2 --folder DIR

Each run is a process of its own on so many cores, imports, checks and reading back included, without calibration and
without an evaluation; its peak resident memory is what the kernel reports. The large model has the demo's tokenizer.
Rows go to benchmarks/results/gguf_write.jsonl.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.bench_model_free import SHAPES, make_model
from lowbit.models.source import open_source

RESULTS = Path(__file__).with_name("results") / "gguf_write.jsonl"
MOST_THREADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of quantize --format gguf")
    parser.add_argument("--models", nargs="+", choices=("demo", *SHAPES), default=["demo"])
    parser.add_argument("--blocks", type=int, help="only the first of a shape")
    parser.add_argument("--scheme", nargs="+", default=["q4_0"])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)
    for model in args.models:
        source = "demo" if model == "demo" else str(made(args.folder / model, model, args.blocks))
        for scheme in args.scheme:
            count = None if model == "demo" else args.blocks or SHAPES[model][0]
            row = {"model": model, "blocks": count} | measured(
                source, args.folder / f"{model}-{scheme}", scheme, len(cores)
            )
            row |= {"load": round(os.getloadavg()[0], 1), "commit": args.commit}
            row |= {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
            print(json.dumps(row), flush=True)
            with args.output.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row) + "\n")


def made(directory: Path, shape: str, blocks: int | None) -> Path:
    """A model of a shape in the new `directory`, with the demo's tokenizer."""
    count, width, inner, keys, vocabulary = SHAPES[shape]
    make_model(directory, shape, blocks or count)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks or count,
        num_attention_heads=width // 128,
        num_key_value_heads=keys // 128,
        head_dim=128,
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    open_source("demo").tokenizer().save_pretrained(directory)
    return directory


def measured(source: str, output: Path, scheme: str, cores: int) -> dict[str, float | str | int]:
    """Seconds, processor seconds and peak resident GiB of a run (of the largest child so far)."""
    settings = ["--method", "rtn", "--scheme", scheme, "--format", "gguf", "--eval-windows", "0", "--device", "cpu"]
    command = [sys.executable, "-c", "from lowbit.commands.quantize import main; main()", source, *settings, "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": str(min(cores, MOST_THREADS))}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([*command, "--output", str(output)], check=True, env=environment)
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "scheme": scheme,
        "cores": cores,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "peak_host_gib": round(after.ru_maxrss / 2**20, 2),
        "output_gb": round((output / "model.gguf").stat().st_size / 1e9, 3),
    }


if __name__ == "__main__":
    main()
