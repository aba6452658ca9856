"""llama.cpp beside lowbit: a dense GGUF of a model, and the perplexity that llama.cpp measures."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.gguf.container import GGUF
from lowbit.models.source import Source

BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
FINAL = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")


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


def perplexity(binaries: Path, model: Path, text: Path, context: int, chunks: int, threads: int) -> float:
    """llama-perplexity of the first `chunks` windows of `context` tokens, the second half of each scored."""
    arguments: list[Any] = ["-m", model, "-f", text, "-c", context, "--chunks", chunks, "-t", threads]
    command = [str(binaries / "llama-perplexity"), *map(str, arguments)]
    environment = os.environ | {"LD_LIBRARY_PATH": str(binaries)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = FINAL.search(done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-1500:]}")
    return float(found[1])
