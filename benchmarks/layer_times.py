"""The time line of one layer: `python -m benchmarks.layer_times [--shape qwen3-30b-a3b] --plot layer.png`.

The extension must be built with -DLOWBIT_STAMPS=NAME (csrc/stamps.cuh), in the shape's dtype, for wna16_gemv.cu in its
bits (stamps_of_products), for decode_attention.cu (stamps_of_attention) and, for a mixture, for route_experts.cu
(stamps_of_routes); dense_gemv.cu (stamps_of_products) for weights in 16 bits, w8a8_gemm.cu (stamps_of_products) for
W8A8, and row_norm.cu (stamps_of_rows) for it and for layer norms. Prints microseconds from the layer's first result
asked for to each stage of each kernel: first block, median, last.
"""

import argparse
import ctypes
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bench_decode import Case, engine_of
from lowbit.engine.engine import Engine
from lowbit.engine.sampler import Features
from lowbit.engine.speed import start
from lowbit.quant.kernels.extension import EXTENSION

STAGES = ("begun", "waited", "computed", "ended")
# of the object, if it has them
NAMES = ("stamps_of_products", "stamps_of_attention", "stamps_of_routes", "stamps_of_rows")
CASES = {
    "llama2-7b": Case("llama2-7b", "w4", (1,)),
    "llama2-7b-bfloat16": Case("llama2-7b", "dense", (1,), dtype="bfloat16"),
    "llama2-7b-w8a8": Case("llama2-7b", "w8a8", (1,)),
    "chatglm2-6b-float16": Case("chatglm2-6b", "dense", (1,)),
    "codegeex-13b-int8": Case("codegeex-13b", "int8", (1,)),
    "qwen3-30b-a3b": Case("qwen3-30b-a3b", "w4", (1,), head="int8", dtype="bfloat16"),
}
DENSE_LAYER = ("qkv", "attention", "o", "gate/up", "down", "next qkv")
ROUNDED_LAYER = ("qkv", "attention", "round", "o", "norm", "gate/up", "silu", "down", "norm", "next qkv")
NORMED_LAYER = ("norm", "qkv", "attention", "o", "norm", "up", "down", "next norm")
LABELS = {
    "llama2-7b": DENSE_LAYER,
    "llama2-7b-bfloat16": DENSE_LAYER,
    "llama2-7b-w8a8": ROUNDED_LAYER,
    "chatglm2-6b-float16": DENSE_LAYER,
    "codegeex-13b-int8": NORMED_LAYER,
    "qwen3-30b-a3b": ("qkv", "attention", "o", "choice", "up", "down", "next qkv"),
}
MOST = 1 << 17
STEPS = 2
LAYER = 16


class StampRow(ctypes.Structure):
    """csrc/stamps.cuh's."""

    _fields_ = [*((name, ctypes.c_int) for name in ("n", "k", "block", "threads")), ("at", ctypes.c_ulonglong * 4)]


def read_stamps(library: ctypes.CDLL, name: str) -> list[StampRow]:
    """The rows that blocks left since the last call."""
    rows = (StampRow * MOST)()
    count = getattr(library, name)(rows, MOST)
    if not 0 <= count <= MOST:
        raise RuntimeError(f"{name}: {count} rows")
    return list(rows[:count])


def launches_of(rows: list[StampRow]) -> list[list[StampRow]]:
    """The rows of each launch, in launch order; each has a block's number once."""
    launches: list[list[StampRow]] = []
    by_kernel: dict[tuple[int, int], list[StampRow]] = {}
    for row in rows:
        by_kernel.setdefault((row.n, row.k), []).append(row)
    for same in by_kernel.values():
        same.sort(key=lambda row: row.at[0])
        blocks = max(row.block for row in same) + 1
        launches += [same[i : i + blocks] for i in range(0, len(same), blocks)]
    return sorted(launches, key=lambda launch: statistics.median(row.at[3] for row in launch))


def layer_of(engine: Engine, library: ctypes.CDLL, batch: int, prompt: int) -> list[list[StampRow]]:
    """The launches of one layer, and the first of the next layer, from a step that ran before."""
    with torch.inference_mode(), engine.spaces.lent() as space:
        runner = space.runner(batch, batch, prompt + 64, Features())
        start(runner, batch, prompt)
        for _ in range(8):
            runner.advance()
        names = [name for name in NAMES if hasattr(library, name)]
        for name in names:
            read_stamps(library, name)
        for _ in range(STEPS):
            runner.advance()
        launches = launches_of([row for name in names for row in read_stamps(library, name)])
    layers = len(engine.decoder.blocks)
    of_each = len(launches) // (layers * STEPS)
    first = len(launches) // STEPS * (STEPS - 1) + of_each * LAYER  # a step ends with the last norm and the head
    return launches[first : first + of_each + 1]


def times_of(launches: list[list[StampRow]]) -> list[dict]:
    """For each launch the first, median and last time of each stage, in us from the first launch's median wait."""
    zero = statistics.median(row.at[1] for row in launches[0])
    found = []
    for launch in launches:
        row: dict = {"n": launch[0].n, "k": launch[0].k, "blocks": len(launch)}
        for index, stage in enumerate(STAGES):
            at = sorted((each.at[index] - zero) / 1e3 for each in launch)
            row[stage] = [round(value, 2) for value in (at[0], statistics.median(at), at[-1])]
        found.append(row)
    return found


def plot(rows: list[dict], labels: tuple[str, ...], path: Path) -> None:
    """A bar a launch: waits, multiplies, ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 3))
    for place, row in enumerate(rows):
        for index, (color, label) in enumerate((("#ddd", "waits"), ("#58c", "computes"), ("#c55", "sums, epilogue"))):
            begin, end = row[STAGES[index]], row[STAGES[index + 1]]
            name = label if place == 0 else None
            axes.barh(place, end[1] - begin[1], left=begin[1], color=color, height=0.6, label=name)
            axes.plot([end[0], end[2]], [place - 0.36 - 0.06 * index] * 2, color=color, linewidth=1.5)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("us; medians over blocks, thin lines from the first block to the last")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=CASES, default="llama2-7b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=Path, help="rows of an earlier run to draw, or where this run's go")
    options = parser.parse_args()
    if options.rows and options.rows.exists():
        rows = json.loads(options.rows.read_text())
    else:
        assert EXTENSION is not None
        library = ctypes.CDLL(str(EXTENSION.__file__))
        engine = engine_of(replace(CASES[options.shape], prompts=(options.prompt,)))
        rows = times_of(layer_of(engine, library, options.batch, options.prompt))
        if options.rows:
            options.rows.write_text(json.dumps(rows))
    for row in rows:
        print(json.dumps(row))
    if options.plot:
        plot(rows, LABELS[options.shape], options.plot)


if __name__ == "__main__":
    main()
