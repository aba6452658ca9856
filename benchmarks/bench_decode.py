"""Decode speed of named shapes: `python -m benchmarks.bench_decode --commit $(git rev-parse --short HEAD)`.

One row per case in benchmarks/results/decode.jsonl, with `--experts` those of mixtures in decode_experts.jsonl. Weights
are random; the read ceiling is measured in the same run by a kernel that only reads. `--plot` draws the last rows.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import Floor, run_facts
from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.shapes import SHAPES, random_weights
from lowbit.engine.speed import kernels_of_step, measure

RESULTS = Path(__file__).with_name("results")
OUTPUT = 128
PROMPTS = (128, 2048)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A shape's weights in memory, measured over batches and prompts."""

    shape: str
    method: str
    batches: tuple[int, ...]
    cache: str = "same"
    head: str = "dense"
    dtype: str = "float16"
    prompts: tuple[int, ...] = PROMPTS


# The most important rows come first, since a lease may end.
CASES = (
    Case("llama2-7b", "w4", (1, 8)),
    Case("llama2-7b", "w4", (8,), cache="int8"),
    Case("llama2-7b", "int8", (1,)),
    Case("llama2-7b", "dense", (1,), dtype="bfloat16"),
    Case("llama2-13b", "w4", (1, 8)),
    Case("llama3-8b", "w4", (1, 8), head="int8-channel"),
    Case("llama2-7b", "w8a8", (1,)),
    Case("codegeex-13b", "int8", (1,)),
    Case("chatglm2-6b", "w4", (1, 8)),
    Case("chatglm2-6b", "dense", (1, 8)),
    Case("llama2-7b", "dense", (1, 8)),
    Case("llama2-13b", "dense", (1, 8)),
    Case("llama2-7b", "w4", (2, 4, 16)),
    *(
        Case("llama2-7b", method, (1, 8), prompts=(128,))
        for method in ("fp8", "fp8-block", "nvfp4", "mxfp4", "w3", "w2")
    ),
)


MIXTURES = tuple(
    Case(shape, method, batches, head=head, dtype="bfloat16", prompts=(128,))
    for shape, method, batches, head in (
        ("qwen3-30b-a3b", "w4", (1, 8, 16), "int8"),
        ("gpt-oss-20b", "experts-mxfp4", (1, 8), "dense"),
        ("mixtral-8x7b", "w4", (1, 8), "int8"),
        ("glm-4.5-air", "w4", (1,), "int8"),
        ("deepseek-v2-lite", "w4", (1,), "int8"),
        ("gemma-4-26b-a4b", "w4", (1, 8), "int8"),
    )
)


def engine_of(case: Case) -> Engine:
    """An engine with random weights on the GPU."""
    architecture = SHAPES[case.shape]
    like = torch.empty(0, dtype=DTYPES[case.dtype], device="cuda")
    context = max(case.prompts) + OUTPUT
    weights = random_weights(architecture, case.method, like, case.head, case.cache)
    options = Options(context)
    return Engine(Decoder(architecture, weights, context), None, options)


def rows_of(case: Case, read_gbs: float, facts: dict[str, str], profile: bool) -> Iterator[dict]:
    """The case's rows. Prints the kernels of a step if a profile is requested."""
    engine = engine_of(case)
    for batch in case.batches:
        for prompt in case.prompts:
            speed = measure(engine, batch, prompt, OUTPUT, read_gbs)
            named = {"shape": case.shape, "method": case.method, "dtype": case.dtype}
            yield named | {"cache": case.cache, "head": case.head} | speed.as_row() | facts
        if profile:
            for name, calls, us in kernels_of_step(engine, batch)[:14]:
                print(f"    {us:9.1f} us {calls:4d} x {name[:110]}")


def plot(source: Path, path: Path) -> None:
    """Shares of the floor, a bar for each row of the commit that `source` ends with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    places = range(len(rows))
    figure, axes = pyplot.subplots(figsize=(8, 0.2 * len(rows) + 1))
    bars = axes.barh(places, [row["share_of_floor"] for row in rows])
    axes.bar_label(bars, [f"{row['tokens_per_s']:.0f} tokens/s" for row in rows], padding=3, fontsize=7)
    axes.set_yticks(places, [label_of(row) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("share of the floor: bytes that must be read / read ceiling / measured time")
    axes.set_xlim(0, 1)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def label_of(row: dict) -> str:
    """The label of a bar in the plot."""
    kind = row["dtype"] if row["method"] == "dense" else row["method"]
    extras = ["int8 cache"] * (row.get("cache") == "int8") + [f"{row['head']} head"] * (row["head"] != "dense")
    return ", ".join([f"{row['shape']} {kind}", *extras, f"{row['batch']} x {row['prompt']}"])


def main() -> None:
    """Measures CASES, or those whose shape and method are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", help="shape:method[:cache]")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or RESULTS / ("decode_experts.jsonl" if arguments.experts else "decode.jsonl")
    if arguments.plot:
        plot(output, arguments.plot)
        return
    facts, read_gbs = run_facts(arguments.commit), Floor().read_ceiling_gbs()
    cases = MIXTURES if arguments.experts else CASES
    wanted = [case for case in cases if f"{case.shape}:{case.method}:{case.cache}".startswith(arguments.only or "")]
    with output.open("a") as file:
        for case in wanted:
            for row in rows_of(case, read_gbs, facts, arguments.profile):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
