"""Distance between correct implementations of a W8A8 model: vLLM's kernels, ours inside vLLM, and exact arithmetic.

    python -m benchmarks.w8a8_agreement --peers DIR --work DIR --commit $(git rev-parse --short HEAD) \\
        [--checkpoint "LABEL=DIR"] ...

Without --checkpoint: two random networks of 32 layers, 512 wide, `wild` with the branches and the spread of logits that
bench_vllm's first network had, `tame` with those it has now. The text is held-out Python documentation, for a network
random tokens. Each pair of

    exact in float64, float32, bfloat16   transformers; every W8A8 product by float64 sums of integer codes, inputs'
                                          codes by x * 127 / absmax in float64; all else in that dtype
    vLLM, vLLM with our linears           in bfloat16 on a CPU

gets a row in benchmarks/results/w8a8_agreement.jsonl: mean and largest distance of the tokens' log-probabilities.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.bench_vllm import Network, write_model
from benchmarks.formats_table import WINDOWS
from benchmarks.readers import read_by
from lowbit.calibrate.data import builtin_text
from lowbit.evaluation.text import cut
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source

RESULTS = Path(__file__).parent / "results" / "w8a8_agreement.jsonl"
WIDER = math.sqrt(4096 / 512)  # keeps the logits, and each layer's addition, as large as with 4096 inputs
SMALL = partial(Network, 512, 1408, 8, vocabulary=4096, weights=0.02 * WIDER, head=0.1 * WIDER, device="cpu")
NETWORKS = {"wild": SMALL(branch=1.0), "tame": SMALL()}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description="how far apart right computations of a W8A8 model lie")
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="LABEL=DIR")
    args = parser.parse_args()
    for label in [] if args.checkpoint else NETWORKS:
        write_model(args.work / label, "w8a8", NETWORKS[label])
    named = [pair.split("=", 1) for pair in args.checkpoint] or [(label, args.work / label) for label in NETWORKS]
    for label, directory in named:
        for row in agreement(label, Path(directory), args.peers / "vllm" / "bin" / "python"):
            row |= {"commit": args.commit, "date": time.strftime("%Y-%m-%d")}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def agreement(label: str, directory: Path, python: Path) -> list[dict[str, object]]:
    """A row for each pair of ways to read the checkpoint."""
    windows = windows_of(label, directory)
    found: dict[str, list[list[float]]] = {
        f"exact, {str(dtype).removeprefix('torch.')}": exact(directory, windows, dtype) for dtype in DTYPES
    }
    for name, kind in (("vLLM", "vllm"), ("vLLM, our linears", "vllm-lowbit")):
        found[name] = read_by(str(python), kind, directory, windows)
    rows: list[dict[str, object]] = []
    for one, other in combinations(found, 2):
        gaps = [abs(a - b) for x, y in zip(found[one], found[other], strict=True) for a, b in zip(x, y, strict=True)]
        distance = {"mean": round(statistics.mean(gaps), 4), "largest": round(max(gaps), 3)}
        rows.append({"checkpoint": label, "one": one, "other": other, **distance, "tokens": len(gaps)})
    return rows


def windows_of(label: str, directory: Path) -> list[list[int]]:
    """Token ids that are scored."""
    if label in NETWORKS:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(5, NETWORKS[label].vocabulary, (4, 128), generator=generator).tolist()
    text = cut(builtin_text("heldout"), open_source(str(directory)), WINDOWS)
    return [window.tolist() for window in text.windows]


def exact(directory: Path, windows: list[list[int]], dtype: torch.dtype) -> list[list[float]]:
    """Log-probabilities by the model in `dtype`, its quantized linears replaced by exact products."""
    logical = LogicalTensors(open_checkpoint(directory))
    model = AutoModelForCausalLM.from_config(open_source(str(directory)).config, dtype=dtype).eval()
    model.load_state_dict({name: logical.read(name).to(dtype) for name in logical.names}, strict=False)
    for name in logical.schemes:
        weight = logical.qtensor(name)
        product = product_by(weight.codes.double(), weight.scales.double()[:, 0], weight.input_scale)
        model.set_submodule(name, Exact(product))
    found = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def product_by(codes: Tensor, scales: Tensor, input_scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T with x rounded to int8, in float64, where integers of this size are exact; rounded once at the end."""

    def product(x: Tensor) -> Tensor:
        wide = x.double()
        scale = wide.abs().amax(-1, keepdim=True) / 127 if input_scale is None else input_scale.double()
        return ((wide / scale).round().clamp(-128, 127) @ codes.T * scale * scales).to(x.dtype)

    return product


class Exact(nn.Module):
    """A linear that multiplies by a function."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = product


if __name__ == "__main__":
    main()
