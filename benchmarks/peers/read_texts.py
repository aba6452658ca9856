"""Greedy texts of checkpoints inside vLLM: log-probabilities of the prompts and of the new tokens.

    PYTHON read_texts.py CHECKPOINT... --out FILE [--graphs] [--own] [--split N]

PYTHON is vLLM's, lowbit there to import, with its entry point, unless `--own` says that vLLM's own kernels read. Each
checkpoint is read at batch 1 and 8, eagerly, or with vLLM's compiler and CUDA graphs, by N GPUs that share each layer.
The output is a line of JSON a checkpoint: {"name", "mode", "own", "split", "vllm", "texts"}, each text {"prompt",
"new", "prompt_rows", "new_rows"}; or "error" in the place of texts.
"""

import argparse
import gc
import json
import os
import random
from pathlib import Path
from typing import Any

LENGTHS = (40, 80, 33, 64, 128, 20, 77, 50)  # of prompts, in tokens
NEW = 24  # tokens written


def main() -> None:
    parser = argparse.ArgumentParser(description="texts of checkpoints in vLLM")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graphs", action="store_true", help="compile, and capture CUDA graphs")
    parser.add_argument("--own", action="store_true", help="by vLLM's own kernels, not by our plugin")
    parser.add_argument("--split", type=int, default=1, help="GPUs that share each layer")
    args = parser.parse_args()
    if args.split == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for checkpoint in args.checkpoints:
        row: dict[str, Any] = {"name": checkpoint.name, "mode": "graphs" if args.graphs else "eager"}
        row |= {"own": args.own, "split": args.split, "vllm": vllm.__version__}
        try:
            row["texts"] = texts_of(checkpoint, args.graphs, args.own, args.split)
        except Exception as error:  # noqa: BLE001  # whatever vLLM raises is what it says of the checkpoint
            row["error"] = f"{type(error).__name__}: {error}"
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        gc.collect()
        cleanup_dist_env_and_memory()


def texts_of(checkpoint: Path, graphs: bool, own: bool, split: int) -> list[dict[str, Any]]:
    """The texts of a checkpoint: one at batch 1, then eight at batch 8."""
    import torch
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": [1, 8]}} if graphs else {}
    if torch.cuda.is_available():
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 28}
    engine = LLM(
        model=str(checkpoint),
        quantization=None if own else "lowbit",
        tensor_parallel_size=split,
        distributed_executor_backend="mp" if split > 1 else None,
        disable_custom_all_reduce=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        enforce_eager=not graphs,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **options,
    )
    dice = random.Random(5)
    prompts = [{"prompt_token_ids": [dice.randrange(256) for _ in range(length)]} for length in LENGTHS]
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    found = [output for batch in (prompts[:1], prompts) for output in engine.generate(batch, sampling, use_tqdm=False)]
    return [text_of(output) for output in found]


def text_of(output: Any) -> dict[str, Any]:
    """Tokens and log-probabilities of one of vLLM's outputs."""
    prompt, new = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    before = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    after = zip(new, output.outputs[0].logprobs, strict=True)
    rows = {"prompt_rows": [entry[token].logprob for token, entry in before]}
    rows |= {"new_rows": [entry[token].logprob for token, entry in after]}
    return {"prompt": prompt, "new": new, **rows}


if __name__ == "__main__":
    main()
