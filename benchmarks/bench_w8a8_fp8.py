"""Products of FP8 with FP8, with and without what comes before them, against other libraries' kernels.

    python -m benchmarks.bench_w8a8_fp8 --commit $(git rev-parse --short HEAD)

prints one table and writes benchmarks/results/w8a8_fp8.jsonl.
"""

from benchmarks.w8a8 import Plan, run_plan
from lowbit.quant.numbers import FP8

SHAPES = ((22016, 4096), (4096, 11008), (12288, 4096), (4096, 4096))
ROWS = (1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096)
PLAN = Plan("w8a8_fp8", ROWS, SHAPES, random_shapes=0, launches=(True,), number=FP8)

if __name__ == "__main__":
    run_plan(PLAN, __doc__)
