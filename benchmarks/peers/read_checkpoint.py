"""Log-probabilities of the tokens of some windows by another program: its reading of a checkpoint, as numbers.

    PYTHON read_checkpoint.py READER CHECKPOINT --windows FILE --out FILE [--dtype bfloat16] [--split N] [--lora DIR]

PYTHON is the reader's own, with its own versions of everything. READER is `transformers` or `vllm`, alone or with
`-lowbit` behind it: then our linears run inside, and lowbit must be there to import (for vLLM, with its entry point).
`--split` and `--lora` are vLLM's tensor parallelism and an adapter that all windows are read with; beside an adapter
only the last token of each window is read, vLLM 0.32 having no other log-probabilities then.
FILE is a JSON list of windows, each a list of token ids. The output is a JSON list: for each window the log-probability
of every token after the first. Where the reader fails, its exception ends the program.
"""

import argparse
import importlib
import json
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="a checkpoint in another program")
    parser.add_argument("reader", choices=["transformers", "transformers-lowbit", "vllm", "vllm-lowbit"])
    parser.add_argument("checkpoint")
    parser.add_argument("--windows", type=Path, required=True, help="JSON: token ids of each window")
    parser.add_argument("--out", type=Path, required=True, help="JSON: log-probabilities of each window")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--split", type=int, default=1, help="processes that share each layer")
    parser.add_argument("--lora", help="directory of an adapter")
    args = parser.parse_args()
    read = {"transformers": with_transformers, "vllm": with_vllm}[args.reader.partition("-")[0]]
    rows = read(args, json.loads(args.windows.read_text()))
    args.out.write_text(json.dumps(rows))


def with_transformers(args: argparse.Namespace, windows: list[list[int]]) -> list[list[float]]:
    """By AutoModelForCausalLM, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    if args.reader.endswith("-lowbit"):
        importlib.import_module("lowbit.integrations.transformers")
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype, device_map="cpu").eval()
    rows = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            rows.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return rows


def with_vllm(args: argparse.Namespace, windows: list[list[int]]) -> list[list[float]]:
    """By vLLM's offline engine, its prompt log-probabilities."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if args.split == 1:  # the engine in this process: what it imports is imported once
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=args.checkpoint,
        quantization="lowbit" if args.reader.endswith("-lowbit") else None,
        dtype=args.dtype,
        max_model_len=max(map(len, windows)) + 8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        language_model_only=True,  # without it a model that sees images asks for its processor
        tensor_parallel_size=args.split,
        enable_lora=bool(args.lora),
        max_logprobs=-1,
    )
    if args.lora:
        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
        prompts = [{"prompt_token_ids": window[:-1]} for window in windows]
        outputs = engine.generate(prompts, sampling, lora_request=LoRARequest("adapter", 1, args.lora))
        entries = [output.outputs[0].logprobs[0] for output in outputs]
        return [[entry[window[-1]].logprob] for window, entry in zip(windows, entries, strict=True)]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": window} for window in windows], sampling)
    return [
        [entry[token].logprob for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)]
        for window, output in zip(windows, outputs, strict=True)
    ]


if __name__ == "__main__":
    main()
