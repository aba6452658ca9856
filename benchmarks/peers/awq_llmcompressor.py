"""llm-compressor's AWQ on a checkpoint, calibrated on token ids that lowbit drew, so that like is compared with like.

    python awq_llmcompressor.py CHECKPOINT IDS.safetensors OUTPUT [--group-size 64] [--duo-scaling true|false|both]

Symmetric 4-bit weights in groups, lm_head left alone, everything else as llm-compressor has it. IDS is what
`CalibrationSet.save` writes. Prints one JSON line: versions, seconds, peak memory. It needs an environment of its own
(`pip install llmcompressor==0.14.0.1`), because llm-compressor and lowbit ask for different transformers.
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import compressed_tensors
import llmcompressor
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file


def main() -> None:
    args = parse()
    ids = load_file(args.ids)["ids"]
    if not torch.accelerator.is_available():
        # 0.14 pins the cached activations for faster copies to a GPU, and dies of it where there is none.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    model = transformers.AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint)
    start = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows(ids),
        recipe=recipe(args),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        output_dir=str(args.output),
    )
    print(json.dumps(report(args, ids, time.perf_counter() - start)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llm-compressor's AWQ, symmetric 4-bit, on lowbit's calibration ids")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--duo-scaling", choices=("true", "false", "both"), default="true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the search")
    return parser.parse_args()


def rows(ids: torch.Tensor) -> Dataset:
    """The ids as llm-compressor takes tokenized data: one window a row, nothing masked."""
    windows = ids.tolist()
    return Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})


def recipe(args: argparse.Namespace) -> list:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": args.group_size}
    duo = args.duo_scaling if args.duo_scaling == "both" else args.duo_scaling == "true"
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return [AWQModifier(duo_scaling=duo), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])]


def report(args: argparse.Namespace, ids: torch.Tensor, seconds: float) -> dict:
    modules = {"llmcompressor": llmcompressor, "compressed_tensors": compressed_tensors, "transformers": transformers}
    return {
        "peer": "llm-compressor AWQ",
        "versions": {name: module.__version__ for name, module in modules.items()} | {"torch": torch.__version__},
        "scheme": f"W4 symmetric g{args.group_size}",
        "duo_scaling": args.duo_scaling,
        "dtype": args.dtype,
        "calibration": list(ids.shape),
        "seconds": round(seconds, 1),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    main()
