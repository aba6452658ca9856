"""Perplexity of a checkpoint by transformers alone: an independent check of lowbit's own figure.

    python perplexity_dense.py CHECKPOINT --text FILE [--windows 16] [--length 1024] [--from-share 0.6]

Windows do not overlap and start cold, no BOS token is added, every token but a window's first is scored, in float32. A
quantized checkpoint is dequantized by transformers, which needs the package `compressed-tensors` for ours. Prints one
JSON line. It imports nothing of lowbit, so the two share no mistakes.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers


def main() -> None:
    args = parse()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint)
    windows = cut(tokenizer, args.text, args.from_share, args.windows, args.length)
    model = load(args.checkpoint)
    start = time.perf_counter()
    losses = torch.tensor([score(model, window) for window in windows], dtype=torch.float64)
    mean, tokens = losses.mean().item(), len(windows) * (args.length - 1)
    row = {
        "checkpoint": args.checkpoint.name,
        "perplexity": round(math.exp(mean), 4),
        "nll": round(mean, 6),
        "nll_by_window": [round(loss, 5) for loss in losses.tolist()],
        "windows": len(windows),
        "length": args.length,
        "tokens": tokens,
        "text": args.text.name,
        "seconds": round(time.perf_counter() - start, 1),
        "transformers": transformers.__version__,
    }
    print(json.dumps(row))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="perplexity by plain transformers, in float32")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument("--from-share", type=float, default=0.0, help="leave out this share of the text's characters")
    return parser.parse_args()


def cut(tokenizer, text: Path, share: float, windows: int, length: int) -> torch.Tensor:
    """The first windows of the text after its first `share`, (windows, length) int64."""
    characters = text.read_text(encoding="utf-8")
    characters = characters[int(len(characters) * share) :]
    ids = tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < windows * length:
        raise SystemExit(f"{text}: {len(ids)} tokens, {windows} windows of {length} need {windows * length}")
    return torch.tensor(ids[: windows * length]).reshape(windows, length)


def load(checkpoint: Path) -> transformers.PreTrainedModel:
    """The model with dense float32 weights."""
    options = {}
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("quantization_config", {}).get("quant_method") == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **options).eval()


@torch.inference_mode()
def score(model: transformers.PreTrainedModel, window: torch.Tensor) -> float:
    """Mean negative log-likelihood of the window's tokens after its first, in nats."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, window[1:]).item()


if __name__ == "__main__":
    main()
