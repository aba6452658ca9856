"""Plots of the H100's rows in benchmarks/results/wna16_*.jsonl: time against rows of x, a picture per shape, with the
floor as a line.

python -m benchmarks.plot_wna16          (needs matplotlib)
"""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.wna16 import SHAPES

RESULTS = Path(__file__).with_name("results")
IMAGES = Path(__file__).parents[1] / "docs" / "images"
STEMS = ("wna16_gemv", "wna16_gemm")


def label_of(row: dict) -> str:
    name = "ours" if row["ours"] else row["kernel"]
    return name + (" with dependent launch" if row.get("dependent") else "")


def read_rows() -> list[dict]:
    """The 4-bit rows of both benchmarks on an H100, g128, symmetric, without the blocks' and the random shapes."""
    lines = [line for stem in STEMS for line in (RESULTS / f"{stem}.jsonl").read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if "H100" in row["gpu"]]
    wanted = [row for row in rows if (row["n"], row["k"]) in SHAPES and row["bits"] == 4 and row["group_size"] == 128]
    wanted = [row for row in wanted if row.get("symmetric", True) and not row["kernel"].endswith("block")]
    return [row for row in wanted if not row["ours"] or row["dtype"] == "float16"]


def draw(axes: plt.Axes, rows: list[dict]) -> None:
    """The 4-bit kernels of one shape, g128, and the floor of the same bytes."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        lines[label_of(row)].append((row["m"], row["us"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    axes.axhline(rows[0]["floor_us"], color="black", linestyle="--", label="floor: reading the bytes")
    axes.set(title=f"{rows[0]['n']} x {rows[0]['k']}", xscale="log", xlabel="rows of x", ylabel="us")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set_ylim(bottom=0, top=4 * rows[0]["floor_us"])


def main() -> None:
    shapes: dict[tuple[int, int], list[dict]] = defaultdict(list)
    for row in read_rows():
        shapes[row["n"], row["k"]].append(row)
    figure, grid = plt.subplots(-(-len(shapes) // 4), 4, figsize=(18, 4 * -(-len(shapes) // 4)), squeeze=False)
    for axes, rows in zip(grid.flat, shapes.values(), strict=False):
        draw(axes, rows)
    grid.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(IMAGES / "wna16.png", dpi=70)


if __name__ == "__main__":
    main()
