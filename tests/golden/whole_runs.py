"""Whole runs of a fixed tiny model, each tensor hashed: `python -m tests.golden.whole_runs` prints them as JSON.

test_bytes.py starts it, with arithmetic pinned. One thread and two must give the same. `probe` hashes sums and
functions of the kinds that quantizing uses. Where it differs, the machine adds in another order, and the hashes of the
runs say nothing about the code.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import lowbit
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.tensorfile import raw_bytes
from tests.builders import make_model, save

TEXT = {"num_samples": 4, "seqlen": 24}  # of a text of its own: the builtin one changes with the interpreter
RUNS: dict[str, dict[str, Any]] = {
    "int8": {},
    "awq": TEXT | {"group_size": 32},
    "gptq": TEXT | {"group_size": 32},
    "smoothquant": TEXT,
    "best": TEXT | {"group_size": 32, "iters": 3, "distill_steps": 3},
}


def wave(shape: tuple[int, ...], step: float) -> Tensor:
    """Numbers between -1 and 1, no two alike, made of products and remainders alone."""
    count = int(torch.tensor(shape).prod())
    return ((torch.arange(count, dtype=torch.float64) * step) % 2 - 1).float().reshape(shape)


def source(directory: Path) -> Path:
    """A llama whose weights no random numbers make."""
    model = make_model("llama")
    for index, parameter in enumerate(model.parameters()):
        noise = wave(tuple(parameter.shape), 0.6180339887 + index / 64)
        parameter.data = 1 + noise / 8 if parameter.ndim == 1 else noise / 4
    return save(model, directory, torch.bfloat16)


def digest(parts: list[Tensor | str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else raw_bytes(part.contiguous()))
    return found.hexdigest()[:16]


def probe() -> str:
    """A hash of products, sums, functions and a factorization."""
    a, b = wave((96, 64), 0.7548776662), wave((64, 160), 0.5698402910)
    spread = a.T @ a + torch.eye(64)
    halves = a.bfloat16() @ b.bfloat16()
    return digest(
        [
            *(a @ b, a.sum(0), a.sum(1), a.softmax(1), a.square().mean(1).rsqrt(), torch.nn.functional.silu(a)),
            *(a.exp(), a.abs().log(), a.sin(), a.cos(), torch.linalg.cholesky(spread), halves),
        ]
    )


def contents(directory: Path) -> dict[str, str]:
    """A hash of every tensor with its type and shape, and of the configuration."""
    checkpoint = open_checkpoint(directory)
    hashes = {"config.json": digest([(directory / "config.json").read_text()])}
    for name, entry in sorted(checkpoint.entries.items()):
        hashes[name] = digest([f"{entry.dtype} {entry.shape}", checkpoint.read(name)])
    return hashes


def runs_in(place: Path, model: Path) -> dict[str, dict[str, str]]:
    """The contents of every run's checkpoint, made in `place`."""
    place.mkdir()
    text = place / "text.txt"
    text.write_text(
        "\n\n".join(f"The square of {n} ends in {n * n % 100:02d}, its cube in {n**3 % 100:02d}." for n in range(200))
    )
    for method, settings in RUNS.items():
        given = settings and {"dataset": str(text), **settings}
        lowbit.quantize(model, place / method, method=method, device="cpu", eval_windows=0, **given)
    return {method: contents(place / method) for method in RUNS}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        model = source(Path(place, "model"))
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(runs_in(Path(place, str(threads)), model))
    for method, hashes in found[0].items():
        changed = [name for name in hashes if hashes[name] != found[1][method][name]]
        if changed:
            sys.exit(f"{method}: {len(changed)} tensors differ with a second thread, the first {changed[0]}")
    sys.stdout.write(json.dumps(versions | {"probe": probe(), "runs": found[0]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
