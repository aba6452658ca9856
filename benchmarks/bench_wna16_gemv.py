"""The fused product for 1 to 8 rows, and a block's projections, against the floor and other libraries' kernels.

    python -m benchmarks.bench_wna16_gemv --commit $(git rev-parse --short HEAD)

prints one table and writes benchmarks/results/wna16_gemv.jsonl; benchmarks.plot_wna16 draws it.
"""

from benchmarks.wna16 import Plan, run_plan

PLAN = Plan("wna16_gemv", (), (1, 2, 4, 8), (1, 8), (1,), blocks=True)

if __name__ == "__main__":
    run_plan(PLAN, __doc__)
