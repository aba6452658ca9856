"""Seconds per gigabyte of `lowbit.quantize(method="rtn")` by stage: the cost of everything but calibration.

    python -m benchmarks.bench_rtn [--shape 7B] [--layers 2] [--repeats 3] [--devices cpu cuda] [--folder DIR]
                                   [--commit HASH] [--output FILE]

A model of the shape of Llama-3.2-1B or Llama-2-7B with random bfloat16 weights, warm in the page cache; its loss is not
measured. One row for each device: the run of the median wall time, with the wall time of each stage, and the wall
times of all. Rows are added to the file. A model in --folder is made once and kept; with --repeats 0 it is only made.
"""

import argparse
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import lowbit
from benchmarks.bench_commands import cpu_name
from lowbit.api.quantizing import BlockDone, Checked, Event, Stage
from lowbit.progress import Step

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
    },
}
SHARED = {"vocab_size": 32000, "tie_word_embeddings": False}
GPU = torch.cuda.is_available()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = (args.folder or Path(folder)) / "model"
        if not source.exists():
            make_model(source, args.shape, args.layers)
        nbytes = warmed(source)
        model = {"shape": args.shape, "layers": args.layers or "all", "source_gb": round(nbytes / 1e9, 3)}
        for device in args.devices if args.repeats else ():
            load = round(os.getloadavg()[0], 1)  # of a minute, before our own
            runs = [run(source, Path(folder) / "out", device) for _ in range(args.repeats)]
            row = {"method": "rtn"} | model | median(runs) | about(device) | {"load": load, "commit": args.commit}
            print(json.dumps(row), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def warmed(source: Path) -> int:
    """Bytes of the model's weights, which are in the page cache afterwards."""
    nbytes = 0
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            while piece := len(file.read(1 << 24)):
                nbytes += piece
    return nbytes


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the median wall time, with those of all runs."""
    chosen = sorted(runs, key=lambda row: row["seconds"])[len(runs) // 2]
    return chosen | {"seconds_all": [row["seconds"] for row in runs]}


def about(device: str) -> dict[str, Any]:
    """The machine."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--layers", type=int, help="less than the shape has")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", nargs="+", default=["cuda" if GPU else "cpu"])
    parser.add_argument("--folder", type=Path, help="an existing directory for the model and the results")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def make_model(directory: Path, shape: str, layers: int | None) -> Path:
    """A checkpoint with random weights."""
    changes = {"num_hidden_layers": layers} if layers else {}
    config = transformers.LlamaConfig(**SHARED | SHAPES[shape] | changes)
    with torch.device("cuda" if GPU else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="5GB")
    return directory


def run(source: Path, output: Path, device: str) -> dict[str, Any]:
    """Wall and CPU time of a run, and wall time of each stage."""
    stages: dict[str, float] = {}
    now, last = "opening", time.monotonic()

    def watch(event: Event) -> None:
        nonlocal now, last
        title = stage_of(event)
        if title is not None and title != now:
            stages[now] = stages.get(now, 0.0) + time.monotonic() - last
            now, last = title, time.monotonic()

    begun, cpu = time.monotonic(), time.process_time()
    lowbit.quantize(source, output, method="rtn", device=device, eval_windows=0, overwrite=True, progress=watch)
    stages[now] = stages.get(now, 0.0) + time.monotonic() - last
    row = {"seconds": round(time.monotonic() - begun, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    return row | {"stages": {title: round(seconds, 2) for title, seconds in stages.items()}}


def stage_of(event: Event) -> str | None:
    match event:
        case Checked():
            return "checking"
        case Stage(text):
            return text
        case Step(title):
            return title
        case BlockDone():
            return "quantizing"
    return None


if __name__ == "__main__":
    main()
