"""llama.cpp beside lowbit: a dense GGUF of a model, the losses that llama.cpp finds, its rounding of inputs."""

import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.gguf.container import GGUF, TYPES
from lowbit.models.source import Source

BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SO_FAR = re.compile(r"\[(\d+)\]([\d.]+),")  # perplexity of the first windows


def dense_gguf(source: Source, place: Path) -> Path:
    """model.gguf with the source's weights as they are, in the new directory `place`."""
    place.mkdir(parents=True)
    for name in BESIDE:
        if (source.directory / name).exists():
            shutil.copy(source.directory / name, place)
    writer = GGUF.writer(place, 0)
    for name in LogicalTensors(source.checkpoint).names:
        tensor = FORMATS["gguf"].kept(name, source.checkpoint.read(name), source.checkpoint.config)
        if tensor is not None:
            writer.add(name, tensor)
    writer.finish(source.checkpoint.config)
    GGUF.seal(place)
    return place / "model.gguf"


def window_losses(binaries: Path, model: Path, text: Path, context: int, chunks: int, threads: int) -> Tensor:
    """Nats a token (chunks,) float64 in the second half of each of the first `chunks` windows of `context` tokens.

    From the perplexities that llama-perplexity prints after each window, of four decimals.
    """
    arguments: list[Any] = ["-m", model, "-f", text, "-c", context, "--chunks", chunks, "-t", threads]
    command = [str(binaries / "llama-perplexity"), *map(str, arguments)]
    environment = os.environ | {"LD_LIBRARY_PATH": str(binaries)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = {int(window): float(value) for window, value in SO_FAR.findall(done.stdout)}
    if sorted(found) != list(range(1, chunks + 1)):
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-1500:]}")
    sums = [window * math.log(found[window]) for window in sorted(found)]
    return torch.tensor([0.0, *sums], dtype=torch.float64).diff()


def inputs_rounded_by(block_type: str, x: Tensor) -> Tensor:
    """`x` (..., k) as llama.cpp's CPU multiplies it with blocks of a type, float32.

    In groups of 32, d = absmax / 127 and codes round(x / d), times d in float16 (Q8_0; of Q8_1 the sums in float16 are
    left out); in the 256 of a K-quant, d = -m / 127 for the m of largest magnitude, in float32 (Q8_K). Sources:
    quantize_row_q8_0_ref and quantize_row_q8_K_ref in ggml-quants.c, vec_dot_type in ggml-cpu.c.
    """
    wide = block_type.endswith("_K")
    groups = x.float().unflatten(-1, (-1, 256 if wide else 32))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (-largest if wide else largest.abs()) / 127
    inverse = torch.where(scales == 0, 0, 1 / scales)
    codes = (groups * inverse).round().clamp(max=127)
    return (codes * (scales if wide else scales.half().float())).flatten(-2).to(x.dtype)


def round_inputs(model: nn.Module, types: dict[str, str]) -> None:
    """Have the linears of a dense `model` round their inputs by the block types of their weights.

    types  by transformers' names; that of embeddings is also a tied head's
    """
    head = model.get_output_embeddings()
    for name, block_type in types.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            module = head if head is not None and head.weight is module.weight else None
        if module is not None:
            module.register_forward_pre_hook(
                lambda _, args, block_type=block_type: (inputs_rounded_by(block_type, args[0]), *args[1:])
            )


def block_types(source: Source) -> dict[str, str]:
    """The block type of each quantized linear of a GGUF, and of its embeddings."""
    found = (name.rpartition(".") for name in source.checkpoint.entries)
    return {linear: TYPES[kind].name for linear, _, kind in found if kind in TYPES}
