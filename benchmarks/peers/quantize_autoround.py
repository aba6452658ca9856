"""AutoRound on a checkpoint, calibrated on the same token ids as lowbit, for a fair comparison.

    PYTHON quantize_autoround.py CHECKPOINT IDS.safetensors OUTPUT --iters 20 [--group-size 64] [--device cpu]

Symmetric 4-bit weights in groups, lm_head unquantized, everything else AutoRound's default; the checkpoint is in GPTQ's
layout. IDS is what `CalibrationSet.save` writes. Prints one JSON line. PYTHON is an environment of its own
(`pip install auto-round==0.16.1`).
"""

import argparse
import json
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from auto_round import AutoRound
from safetensors.torch import load_file


def main() -> None:
    args = parse()
    ids = load_file(args.ids)["ids"]
    start = time.perf_counter()
    rounder = AutoRound(
        str(args.checkpoint),
        scheme="W4A16",
        group_size=args.group_size,
        sym=True,
        iters=args.iters,
        dataset=list(ids.split(1)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map=args.device,
    )
    with TemporaryDirectory() as folder:
        rounder.quantize_and_save(folder, format="auto_gptq")
        (quantized,) = (path.parent for path in Path(folder).rglob("model.safetensors"))
        shutil.move(quantized, args.output)
    gpu = args.device != "cpu"
    peak = torch.cuda.max_memory_allocated() if gpu else 1000 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {"by": f"AutoRound {version('auto-round')}", "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(facts | {"peak_gpu_gb" if gpu else "peak_rss_gb": round(peak / 1e9, 2)}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="AutoRound on lowbit's calibration ids")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
