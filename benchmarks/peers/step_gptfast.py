"""gpt-fast's decode step of Llama-2-7B, alone, batch 1 behind 128 tokens: milliseconds.

    cd CHECKOUT && PYTHON step_gptfast.py {bf16,int8,int4} OUT.jsonl

CHECKOUT is gpt-fast's (pytorch-labs/gpt-fast at 32971d3): its model and its quantizers, int4 in groups of 128 by
tinygemm. Weights are random. The step, with its sampling, is compiled as gpt-fast's `--compile` does, in CUDA graphs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import quantize
import torch
import torch._inductor.config
from model import Transformer

PROMPT, TOKENS, REPEATS, CONTEXT = 128, 128, 7, 384
TEMPERATURE, TOP_K = 0.8, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("bf16", "int8", "int4"))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch._inductor.config.coordinate_descent_tuning = True
    torch._inductor.config.triton.unique_kernel_names = True
    with torch.no_grad():
        times = sorted(times_of(model_of(arguments.mode)))
    row = {"engine": "gpt-fast 32971d3", "shape": "llama2-7b", "mode": arguments.mode, "batch": 1, "prompt": PROMPT}
    row |= {"ms": round(statistics.median(times), 4), "least_ms": round(times[0], 4), "most_ms": round(times[-1], 4)}
    row |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(row))
    with arguments.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def model_of(mode: str) -> Any:
    """The model on the GPU, with random weights."""
    with torch.device("meta"):
        model = Transformer.from_name("7B")
    if mode == "int8":
        quantize.WeightOnlyInt8QuantHandler(model).convert_for_runtime()
    if mode == "int4":
        quantize.WeightOnlyInt4QuantHandler(model, 128).convert_for_runtime()
    model = model.to_empty(device="cuda").eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        fill(name, tensor.data)
    model = model.to(torch.bfloat16)
    with torch.device("cuda"):
        model.setup_caches(1, CONTEXT)
    return model


def fill(name: str, tensor: torch.Tensor) -> None:
    """Random codes, small scales, norms of one, and weights of a standard deviation of 0.02."""
    if not tensor.is_floating_point():
        limits = torch.iinfo(tensor.dtype)
        tensor.copy_(torch.randint(limits.min, limits.max, tensor.shape, dtype=tensor.dtype, device="cuda"))
    elif "scales" in name:
        tensor.uniform_(1e-4, 2e-4)
    elif tensor.ndim == 1:
        tensor.fill_(1)
    else:
        tensor.normal_(0, 0.02)


def times_of(model: Any) -> list[float]:
    """Milliseconds of a step, REPEATS times over TOKENS steps."""

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = model(token, position)[:, -1] / TEMPERATURE
        least = torch.topk(logits, TOP_K)[0][:, -1:]
        chances = torch.softmax(torch.where(logits < least, -float("inf"), logits), -1)
        return torch.argmax(chances / torch.empty_like(chances).exponential_(1), -1, keepdim=True).to(torch.int)

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)

    def write(tokens: int) -> float:
        position, token = (torch.full(shape, PROMPT, device="cuda", dtype=torch.int) for shape in ((1,), (1, 1)))
        begin = time.perf_counter()
        for _ in range(tokens):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                token, position = compiled(token.clone(), position).clone(), position + 1
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / tokens

    write(8), write(8)
    return [write(TOKENS) for _ in range(REPEATS)]


if __name__ == "__main__":
    main()
