"""Peak host memory of `quantize` on a model of three billion random parameters in a real configuration.

    python benchmarks/bench_memory.py [--method int8 awq] [--device cpu] [--folder DIR]

The shape is that of Llama-3.2-3B: 28 blocks, 3072 wide, 6.4 GB in bfloat16. Each run is a process of its own; its peak
resident memory is what the kernel reports for it (the figure that /usr/bin/time -v prints). Rows go to
benchmarks/results/memory.jsonl.
"""

import argparse
import datetime
import json
import multiprocessing
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

import lowbit
from lowbit.export.tensorfile import TensorFileWriter
from lowbit.models.demo import demo_model_dir

RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
CONFIG = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's tensors."""
    width, inner, values = 3072, 8192, 1024
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], width)
    for i in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, rows in (("q_proj", width), ("k_proj", values), ("v_proj", values), ("o_proj", width)):
            yield f"{block}.self_attn.{name}.weight", (rows, width)
        for name, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))):
            yield f"{block}.mlp.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)


def make_model(directory: Path, tokenizer: Path) -> None:
    """A checkpoint of random bfloat16 weights, with the tokenizer of another."""
    directory.mkdir(parents=True)
    writer = TensorFileWriter(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes():
        one = len(shape) == 1
        writer.add(name, torch.ones(shape) if one else torch.randn(shape, generator=generator).mul_(0.02).bfloat16())
    writer.close()
    config = LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)


def measure(model: Path, method: str, device: str) -> dict[str, object]:
    """One run's row."""
    settings: dict[str, object] = {"method": method, "device": device}
    settings |= {"num_samples": 16, "seqlen": 512} if method == "awq" else {}
    begun = time.monotonic()
    in_a_process(lowbit.quantize, model, model.parent / method, **settings)
    seconds = time.monotonic() - begun
    # the largest child so far: runs are ordered from small to large
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    shutil.rmtree(model.parent / method)
    return {
        "what": "quantize, 3B random weights",
        "method": method,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "peak_host_gib": round(peak / 2**30, 3),
        "seconds": round(seconds, 1),
        "model_gib": round((model / "model.safetensors").stat().st_size / 2**30, 3),
        "torch": torch.__version__,
        "settings": " ".join(f"{key}={value}" for key, value in settings.items()),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def in_a_process(function: Callable, *args: object, **settings: object) -> None:
    """Run in a separate process: the peak is per process, and a child's includes its parent's memory at the start."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=args, kwargs=settings)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{function.__name__} ended with {child.exitcode}")


def commit() -> str:
    """The measured commit; empty if the tree has no history."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Measure each requested method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", default=["int8", "awq"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="Where the 6.4 GB model is made, and kept.")
    parser.add_argument("--tokenizer", type=Path, help="A model directory to take the tokenizer from; default: demo.")
    arguments = parser.parse_args()
    tokenizer = arguments.tokenizer or demo_model_dir()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    if not (folder / "model").exists():
        in_a_process(make_model, folder / "model", tokenizer)
    RESULTS.parent.mkdir(exist_ok=True)
    for method in arguments.method:
        row = measure(folder / "model", method, arguments.device)
        print(json.dumps(row))
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
