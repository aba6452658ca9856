"""Time and memory of `quantize --model-free` from disk to disk, on a model of random weights in a real shape.

    python -m benchmarks.bench_model_free --shape llama2-7b --scheme fp8 nvfp4-a16 --device cuda --folder DIR

Shards hold at most 5 GB. Before a run the source is dropped from the page cache, file by file, so that it is read from
the disk; output files are flushed to it. Each run is a process of its own, imports and all; its peak resident memory
is what the kernel reports. Rows go to benchmarks/results/model_free.jsonl.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from lowbit.export.tensorfile import PlannedFile, Spec

RESULTS = Path(__file__).with_name("results") / "model_free.jsonl"
SHARD = 5_000_000_000  # bytes
SHAPES = {  # blocks, width, inner width, width of keys, vocabulary
    "llama2-7b": (32, 4096, 11008, 4096, 32000),
    "llama3-70b": (80, 8192, 28672, 1024, 128256),
    "llama-3b": (28, 3072, 8192, 1024, 49152),  # the demo's vocabulary
}


def tensors_of(shape: str, blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's tensors, of its first `blocks`."""
    _, width, inner, keys, vocabulary = SHAPES[shape]
    yield "model.embed_tokens.weight", (vocabulary, width)
    for i in range(blocks):
        home = f"model.layers.{i}"
        for role, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            yield f"{home}.self_attn.{role}_proj.weight", (rows, width)
        for role, sizes in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            yield f"{home}.mlp.{role}_proj.weight", sizes
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{home}.{norm}.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def make_model(directory: Path, shape: str, blocks: int) -> int:
    """Write the model, in bfloat16. Returns its bytes."""
    directory.mkdir(parents=True)
    shards: list[dict[str, Spec]] = [{}]
    total = size = 0
    for name, sizes in tensors_of(shape, blocks):
        nbytes = 2 * math.prod(sizes)
        if size and size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = (torch.bfloat16, sizes)
        size, total = size + nbytes, total + nbytes
    noise = torch.randn(1 << 26).mul_(0.02).bfloat16()
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        file = PlannedFile(directory / f"model-{i:05}-of-{len(shards):05}.safetensors", tensors)
        for name, (_, sizes) in tensors.items():
            left = math.prod(sizes)
            while left:
                file.write(noise[: min(left, len(noise))])
                left -= min(left, len(noise))
            weight_map[name] = file.path.name
        file.close()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": blocks}
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def forget(directory: Path) -> None:
    """Drop the files of `directory` from the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_of(source: Path, output: Path) -> float:
    """Seconds to copy the files and have them on the disk, by a program that does nothing else."""
    forget(source)
    begun = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", source, output], check=True)
    subprocess.run(["sync", *output.iterdir()], check=True)
    seconds = time.monotonic() - begun
    shutil.rmtree(output)
    return seconds


def run(source: Path, output: Path, scheme: str, device: str) -> tuple[float, float, float]:
    """Seconds of a run in a process of its own, its processor seconds, and peak resident GiB (the largest child's)."""
    forget(source)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = [str(source), "--model-free", "--method", "rtn", "--scheme", scheme, "--device", device]
    begun = time.monotonic()
    command = [sys.executable, "-c", "from lowbit.commands.quantize import main; main()", *arguments]
    subprocess.run([*command, "--quiet", "--output", str(output)], check=True)
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, after.ru_maxrss / 2**20


def main() -> None:
    """One row for each scheme."""
    parser = argparse.ArgumentParser(description="time and memory of quantize --model-free")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--blocks", type=int, help="only the first; the shape's by default")
    parser.add_argument("--scheme", nargs="+", default=["fp8"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    source, output = args.folder / "source", args.folder / "output"
    blocks = args.blocks or SHAPES[args.shape][0]
    nbytes = make_model(source, args.shape, blocks)
    for scheme in args.scheme:
        copied = copy_of(source, output)
        seconds, processor, peak = run(source, output, scheme, args.device)
        written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        row = {"shape": args.shape, "blocks": blocks, "scheme": scheme, "seconds": round(seconds, 1)}
        row |= {"processor_seconds": round(processor, 1), "copy_seconds": round(copied, 1)}
        row |= {"source_gb": round(nbytes / 1e9, 2), "output_gb": round(written / 1e9, 2)}
        row |= {"read_gb_s": round(nbytes / 1e9 / seconds, 3), "peak_host_gib": round(peak, 2)}
        row |= {"device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu"}
        row |= {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
        row |= {"commit": args.commit, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
