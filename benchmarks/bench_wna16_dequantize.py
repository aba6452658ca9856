"""Rates of packing a weight, unpacking it, and writing it out dense.

    python -m benchmarks.bench_wna16_dequantize --commit $(git rev-parse --short HEAD)

writes benchmarks/results/wna16_dequantize.jsonl. gbs counts packed bytes for prepack and unprepack, packed bytes read
and dense bytes written for dequantize.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.measure import run_facts, time_calls, write_rows
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import pack_codes, prepack, unpack_codes
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import make_scheme

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))
RESULTS = Path(__file__).with_name("results") / "wna16_dequantize.jsonl"


def measure(n: int, k: int, bits: int) -> list[dict]:
    """One row each for packing the codes, unpacking them, and the dense weight."""
    scheme = make_scheme(bits, 128 if bits == 4 else -1, symmetric=True)
    weight = round_to_nearest(torch.randn(n, k, device="cuda"), scheme, torch.float16)
    packed = prepack(weight, torch.float16)
    codes = weight.codes.view(torch.uint8) + scheme.number.bias
    calls = {
        "prepack": (lambda: pack_codes(codes, bits, 16), packed.nbytes),
        "unprepack": (lambda: unpack_codes(packed.words, n, k, bits, 16), packed.nbytes),
        "wna16_dequantize": (lambda: ops.dequantize(packed), packed.nbytes + 2 * n * k),
    }
    rows = []
    for name, (call, nbytes) in calls.items():
        timing = time_calls([call])
        rows.append(
            {
                "kernel": name,
                "ours": True,
                "n": n,
                "k": k,
                "bits": bits,
                "group_size": scheme.group_size,
                "dtype": "float16",
                **asdict(timing),
                "gbs": round(nbytes / timing.us / 1e3, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    facts = run_facts(options.commit)
    rows = [{**row, **facts} for n, k in SHAPES for bits in (4, 8) for row in measure(n, k, bits)]
    for row in rows:
        print(f"{row['kernel']:<18} {row['n']} x {row['k']} w{row['bits']}: {row['us']:.1f} us, {row['gbs']} GB/s")
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
