"""AutoRound on a checkpoint, calibrated on the same token ids as lowbit, for a fair comparison.

    PYTHON quantize_autoround.py CHECKPOINT IDS.safetensors OUTPUT --iters 20 [--scheme w4] [--group-size 64] [--ext]
        [--device cpu]

Schemes that begin with "gguf:" are exported as such a file, model.gguf in OUTPUT with the checkpoint's tokenizer.

Weights alone are quantized (symmetric integers in groups, NVFP4 or MXFP4), lm_head is not; everything else is
AutoRound's default, with `--ext` its extended algorithm. 4-bit integers are written in GPTQ's layout, all else as
AutoRound's "fake" format, the dequantized weights. IDS is what `CalibrationSet.save` writes. Prints one JSON line.
PYTHON is an environment of its own (`pip install auto-round==0.16.1`).
"""

import argparse
import json
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from safetensors.torch import load_file

GGUF = ("gguf:q4_k_m", "gguf:q3_k_m", "gguf:q2_k_s")
FLOATS = {"nvfp4": ("nv_fp", 16), "mxfp4": ("mx_fp", 32)}  # AutoRound's name and its group size


def main() -> None:
    args = parse()
    ids = load_file(args.ids)["ids"]
    start = time.perf_counter()
    rounder = AutoRound(
        str(args.checkpoint),
        **scheme(args),
        iters=args.iters,
        enable_alg_ext=args.ext,
        dataset=list(ids.split(1)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map=args.device,
    )
    with TemporaryDirectory() as folder:
        if args.scheme.startswith("gguf:"):
            rounder.quantize_and_save(folder, format=args.scheme)
            (quantized,) = Path(folder).rglob("*.gguf")
            shutil.copytree(args.checkpoint, args.output, ignore=shutil.ignore_patterns("*.safetensors*"))
            shutil.move(quantized, args.output / "model.gguf")
        else:
            rounder.quantize_and_save(folder, format="auto_gptq" if args.scheme == "w4" else "fake")
            (quantized,) = (path.parent for path in Path(folder).rglob("model.safetensors"))
            shutil.move(quantized, args.output)
    gpu = args.device != "cpu"
    peak = torch.cuda.max_memory_allocated() if gpu else 1000 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {"by": f"AutoRound {version('auto-round')}", "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(facts | {"peak_gpu_gb" if gpu else "peak_rss_gb": round(peak / 1e9, 2)}))


def scheme(args: argparse.Namespace) -> dict[str, Any]:
    """AutoRound's arguments for a scheme of weights."""
    if args.scheme.startswith("gguf:"):
        return {"scheme": args.scheme}
    if args.scheme in FLOATS:  # the presets quantize inputs too, whatever `act_bits` says
        kind, size = FLOATS[args.scheme]
        return {"scheme": QuantizationScheme(bits=4, group_size=size, sym=True, data_type=kind, act_bits=16)}
    return {"scheme": f"{args.scheme.upper()}A16", "group_size": args.group_size, "sym": True}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="AutoRound on lowbit's calibration ids")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--scheme", choices=("w2", "w3", "w4", *FLOATS, *GGUF), default="w4")
    parser.add_argument("--ext", action="store_true", help="AutoRound's extended algorithm, enable_alg_ext")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
