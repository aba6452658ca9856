"""Perplexity of GGUF files by llama.cpp and by our own reader, on the same tokens.

    python -m benchmarks.bench_gguf DIR... --text FILE --bin DIR --label demo --commit $(git rev-parse --short HEAD)

Each DIR holds a model.gguf. As llama-perplexity does it: windows of 512 tokens without overlap, the second half of each
scored, no BOS token added; of the last 40% of FILE, which bench_quality scores too. llama.cpp rounds the inputs of its
products to 8 bits; we compute in float32, and once more with the same rounding (`rounded`), so that a row tells what a
file holds from what its reader does with it. Differences are of perplexities, with the standard error of their mean
over windows. Rows go to benchmarks/results/gguf.jsonl.
"""

import argparse
import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_quality import SHARE, device_name
from benchmarks.llamacpp import block_types, round_inputs, window_losses
from lowbit.evaluation.backend import token_log_likelihoods
from lowbit.models.skeleton import fill_all, open_skeleton
from lowbit.models.source import open_source

RESULTS = Path(__file__).parent / "results" / "gguf.jsonl"
CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of GGUF files by llama.cpp and by lowbit")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bin", type=Path, required=True, help="llama-perplexity and its libraries")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--label", default="demo", help="the model's name in rows")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    whole = args.text.read_text(encoding="utf-8")
    text = whole[int(SHARE * len(whole)) :]
    with tempfile.TemporaryDirectory() as folder:
        scored = Path(folder, "scored.txt")
        scored.write_text(text, encoding="utf-8")
        for directory in args.models:
            theirs = window_losses(args.bin, directory / "model.gguf", scored, CONTEXT, args.windows, args.threads)
            ours = of_second_halves(directory, text, args.windows, args.device)
            alike = of_second_halves(directory, text, args.windows, args.device, rounded=True)
            row = {
                "model": args.label,
                "file": directory.name,
                "perplexity": perplexity(ours),
                "llama_cpp": perplexity(theirs),
                **apart(theirs, ours, "relative"),
                "rounded": perplexity(alike),
                **apart(theirs, alike, "relative_rounded"),
                "text": args.text.name,
                "windows": args.windows,
                "context": CONTEXT,
                "device": device_name(args.device),
                "commit": args.commit,
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            }
            print(json.dumps(row), flush=True)
            with args.output.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row) + "\n")


def perplexity(losses: Tensor) -> float:
    return round(math.exp(float(losses.mean())), 4)


def apart(theirs: Tensor, ours: Tensor, name: str) -> dict[str, float]:
    """The relative difference of two perplexities by their windows' losses, and its standard error."""
    difference = theirs - ours
    mean, error = float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
    return {name: round(math.expm1(mean), 5), f"{name}_se": round(error, 5)}


def of_second_halves(directory: Path, text: str, windows: int, device: str, rounded: bool = False) -> Tensor:
    """Our loss in the second half of each window, nats a token (windows,) float64.

    rounded  with the inputs of quantized products rounded as llama.cpp rounds them
    """
    source = open_source(str(directory))
    ids = torch.tensor(source.tokenizer()(text, add_special_tokens=False, verbose=False).input_ids)
    model = fill_all(open_skeleton(source), device, torch.float32).model
    if rounded:
        round_inputs(model, block_types(source))
    losses = []
    with torch.no_grad():
        for window in ids[: windows * CONTEXT].view(windows, 1, CONTEXT).to(device):
            logits = model(input_ids=window, use_cache=False).logits
            scored = token_log_likelihoods(logits.float(), window)[:, CONTEXT // 2 :]
            losses.append(-scored.double().mean().cpu())
    return torch.stack(losses)


if __name__ == "__main__":
    main()
