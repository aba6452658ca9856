"""The fused product for 16 to 64 rows, against the floor and other libraries' kernels.

    python -m benchmarks.bench_wna16_gemm --commit $(git rev-parse --short HEAD)

prints one table and writes benchmarks/results/wna16_gemm.jsonl; benchmarks.plot_wna16 draws it. Each shape also has a
row for m = 1, as the reference for the others.
"""

from benchmarks.wna16 import Plan, run_plan

PLAN = Plan("wna16_gemm", (1,), (16, 32, 64), (16, 64), (32,), blocks=False)

if __name__ == "__main__":
    run_plan(PLAN, __doc__)
