"""Calibration time of each method on a GPU: a model of a real shape, random weights, 128 x 2048 random tokens.

    python -m benchmarks.bench_calibrate [--shape llama2-7b] [--blocks 3] [--methods gptq awq smoothquant signround] \\
        [--commit HASH] [--output benchmarks/results/calibrate.jsonl]

A few blocks are quantized and written, and the time for all blocks of the model is extrapolated: the median time of a
block and of the step between blocks (reading, packing, writing) times the number of blocks, plus the time before the
first block, plus the time after the last one (other tensors, verification) scaled by the bytes written. Tuning on the
model's output is timed step by step and scaled by the blocks, its head included: an upper bound. Its memory is in
proportion to the blocks too: two runs with different `--blocks` tell it. Prints the phases of a block and peak memory;
one row per method.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.measure import run_facts, write_rows
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.distill import TUNING
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.calibrate.report import TUNING_STEP, BlockReport
from lowbit.models.source import Source, open_source
from lowbit.progress import Part, Step, watched_by

COMMON: dict[str, Any] = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "num_key_value_heads": 4}
MIXTURE = COMMON | {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}
LLAMA2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
QWEN3 = {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32}
LARGE = {"hidden_size": 4096, "moe_intermediate_size": 1536, "intermediate_size": 12288, "num_attention_heads": 64}


@dataclass(frozen=True)
class Shape:
    """transformers' configuration of a model of so many layers, which few blocks stand for."""

    layers: int
    config: str
    values: dict[str, Any]


SHAPES = {
    "llama2-7b": Shape(32, "LlamaConfig", COMMON | LLAMA2 | {"num_key_value_heads": 32}),
    "qwen3-30b-a3b": Shape(48, "Qwen3MoeConfig", MIXTURE | QWEN3),
    "qwen3-235b-a22b": Shape(94, "Qwen3MoeConfig", MIXTURE | LARGE),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128},
    "smoothquant": {},
    "signround": {"bits": 4, "group_size": 128, "iters": 200},
    "best": {"bits": 4, "group_size": 128},
    "best-3-bits": {"method": "best", "bits": 3, "group_size": 128},
    "best-2-bits": {"method": "best", "bits": 2, "group_size": 64, "rounder": "anneal", "anneal_steps": 100},
}
CHANNEL = 30.0  # gain of every 64th input: outliers as in a real model, which searches have to weigh


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[args.shape]
        source = make_model(Path(folder) / "model", shape, args.blocks)
        size = args.samples, args.seqlen
        tokens = torch.randint(0, shape.values["vocab_size"], size, generator=torch.Generator())
        rows = []
        for method in args.methods:
            (output := Path(folder) / method).mkdir()
            row = measure(source, shape, method, CalibrationSet(tokens, "random"), output, args.device)
            rows.append({"shape": args.shape} | row | facts(args))
            print(json.dumps(rows[-1]), flush=True)
    if args.output:
        write_rows(args.output, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="how long each method takes on a real shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def facts(args: argparse.Namespace) -> dict[str, Any]:
    return run_facts(args.commit) if args.device != "cpu" else {}


def make_model(directory: Path, shape: Shape, blocks: int) -> Source:
    """A checkpoint of the shape with so many blocks, in bfloat16."""
    config = getattr(transformers, shape.config)(num_hidden_layers=blocks, **shape.values)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::64] *= CHANNEL
    model.save_pretrained(directory)
    return open_source(str(directory))


def measure(
    source: Source, shape: Shape, method: str, calibration: CalibrationSet, output: Path, device: str
) -> dict[str, Any]:
    """Seconds of the run and its phases, and peak memory; that of the host is this process's since its start."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    job = prepare(source, complete_recipe({"method": method} | SETTINGS[method]), device)
    reports: list[BlockReport] = []
    ends: list[float] = []  # of blocks, seconds since the run began

    def note(report: BlockReport) -> None:
        report.phases.pop(TUNING_STEP, None)  # an estimate for another stage
        reports.append(report)
        ends.append(time.monotonic() - begun)
        print(f"{method}: block {len(reports)} at {ends[-1]:.1f} s, {rounded(report.phases)}", flush=True)

    steps: list[float] = []  # ends of the steps of tuning

    def watch(event: Step | Part) -> None:
        if isinstance(event, Step) and event.title == TUNING:
            steps.append(time.monotonic() - begun)

    begun = time.monotonic()
    with watched_by(watch):
        result = run(job, output, calibration, note)
    seconds = time.monotonic() - begun
    tuned = steps[-1] - ends[-1] if steps else 0.0
    blocks = [sum(report.phases.values()) for report in reports]
    phases = {name: statistics.median(r.phases[name] for r in reports) for name in reports[0].phases}
    between = statistics.median(
        later - earlier - b for earlier, later, b in zip(ends[:-1], ends[1:], blocks[1:], strict=True)
    )
    before, after = ends[0] - blocks[0], seconds - ends[-1] - tuned
    besides = 2 * 2 * shape.values["vocab_size"] * shape.values["hidden_size"]  # bytes of embeddings and head
    written = (besides + shape.layers / len(blocks) * (result.output_bytes - besides)) / result.output_bytes
    return {
        "method": method,
        "settings": SETTINGS[method],
        "tokens": calibration.tokens,
        "blocks": len(blocks),
        "block_s": round(statistics.median(blocks), 3),
        "block_s_all": [round(block, 3) for block in blocks],
        "before_s": round(before, 3),
        "between_s": round(between, 3),
        "after_s": round(after, 3),
        "tuning_s": round(tuned, 3),
        "model_s": round(
            before + shape.layers * (statistics.median(blocks) + between + tuned / len(blocks)) + written * after, 1
        ),
        "phases_s": rounded(phases),
        "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device != "cpu" else None,
    }


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """Times to the millisecond."""
    return {name: round(value, 3) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
