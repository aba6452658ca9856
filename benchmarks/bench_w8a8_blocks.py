"""Products of FP8 in blocks of 128 x 128 with FP8 in groups of 128, with and without what comes before them.

    python -m benchmarks.bench_w8a8_blocks --commit $(git rev-parse --short HEAD)

prints one table and writes benchmarks/results/w8a8_blocks.jsonl.
"""

from benchmarks.bench_w8a8_fp8 import SHAPES
from benchmarks.w8a8 import Plan, run_plan
from lowbit.quant.numbers import FP8

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 4096)
PLAN = Plan("w8a8_blocks", ROWS, SHAPES, random_shapes=0, launches=(True,), number=FP8, in_blocks=True)

if __name__ == "__main__":
    run_plan(PLAN, __doc__)
