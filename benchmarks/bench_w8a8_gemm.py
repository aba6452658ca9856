"""The int8 product for few rows, with and without the rounding of x, against the floor and other libraries' kernels.

    python -m benchmarks.bench_w8a8_gemm --commit $(git rev-parse --short HEAD)

prints one table and writes benchmarks/results/w8a8_gemm.jsonl.
"""

from benchmarks.w8a8 import Plan, run_plan

PLAN = Plan("w8a8_gemm", (1, 16, 64))

if __name__ == "__main__":
    run_plan(PLAN, __doc__)
