"""The int8 product for many rows, with and without what comes before it, against other libraries' kernels.

    python -m benchmarks.bench_w8a8_cutlass --commit $(git rev-parse --short HEAD)

prints one table and writes benchmarks/results/w8a8_cutlass.jsonl.
"""

from benchmarks.w8a8 import Plan, run_plan

SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (28672, 4096), (27648, 5120), (8192, 28672))
PLAN = Plan("w8a8_cutlass", (512, 2048, 4096), SHAPES, random_shapes=2, launches=(True,))

if __name__ == "__main__":
    run_plan(PLAN, __doc__)
