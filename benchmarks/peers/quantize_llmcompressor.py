"""llm-compressor on a checkpoint, calibrated on the same token ids as lowbit, for a fair comparison.

    PYTHON quantize_llmcompressor.py CHECKPOINT IDS.safetensors OUTPUT --method rtn|awq|gptq|smoothquant [--scheme NAME]

awq and gptq: symmetric 4-bit weights in groups, or weights of a preset scheme of compressed-tensors (NVFP4A16);
smoothquant: strength 0.8, then GPTQ, int8 weights and inputs. lm_head is left alone, everything else is as
llm-compressor has it. IDS is what `CalibrationSet.save` writes. Prints one JSON
line. PYTHON is an environment of its own (`pip install llmcompressor==0.14.0.1`): it and lowbit ask for different
versions of transformers.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import llmcompressor
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file

STRENGTH = 0.8


def main() -> None:
    args = parse()
    ids = load_file(args.ids)["ids"]
    if not torch.accelerator.is_available():
        # 0.14 pins the cached activations for faster copies to a GPU, and crashes without one.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    model = transformers.AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {"by": f"llm-compressor {llmcompressor.__version__}", "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(facts | {"peak_rss_gb": round(peak / 1e6, 2)}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llm-compressor on lowbit's calibration ids")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=("rtn", "awq", "gptq", "smoothquant"), required=True)
    parser.add_argument("--scheme", help="a preset: NVFP4A16, MXFP4A16, FP8_DYNAMIC; default: 4-bit integers")
    parser.add_argument("--group-size", type=int, default=64)
    return parser.parse_args()


def rows(ids: torch.Tensor) -> Dataset:
    """The ids in llm-compressor's form of tokenized data: one window per row, nothing masked."""
    windows = ids.tolist()
    return Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})


def recipe(args: argparse.Namespace) -> list:
    if args.method == "smoothquant":
        int8 = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        return [SmoothQuantModifier(smoothing_strength=STRENGTH), int8]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": args.group_size}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    scheme = {"scheme": args.scheme, "targets": "Linear"} if args.scheme else groups
    if args.method == "gptq":
        return [GPTQModifier(**scheme, ignore=["lm_head"])]
    return [*([AWQModifier()] if args.method == "awq" else []), QuantizationModifier(**scheme, ignore=["lm_head"])]


if __name__ == "__main__":
    main()
