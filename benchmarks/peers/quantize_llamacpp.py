"""llama.cpp's quantizer with an importance matrix of lowbit's calibration ids, for a fair comparison.

    python quantize_llamacpp.py DENSE.gguf IDS.safetensors OUTPUT --bin DIR --type Q4_K_M [--threads 2]

DIR holds llama-imatrix, llama-quantize and their libraries (llama-cpp-python 0.3.36 was tried). llama-imatrix reads
text, so the ids are decoded with the tokenizer beside DENSE.gguf, where the matrix stays for the next type. OUTPUT
becomes a copy of that directory, with another model.gguf. IDS is what `CalibrationSet.save` writes. Prints one
JSON line.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer


def main() -> None:
    args = parse()
    ids = load_file(args.ids)["ids"]
    start = time.perf_counter()
    matrix = args.dense.with_name(f"imatrix-{hashlib.sha256(args.ids.read_bytes()).hexdigest()[:16]}.gguf")
    if not matrix.exists():
        tokenizer = Tokenizer.from_file(str(args.dense.parent / "tokenizer.json"))
        measure(args, ids.shape[1], "".join(tokenizer.decode_batch(ids.tolist())), matrix)
    shutil.copytree(args.dense.parent, args.output, ignore=shutil.ignore_patterns("*.gguf"))
    made = args.output / "model.gguf"
    run(args.bin, "llama-quantize", "--imatrix", matrix, args.dense, made, args.type, args.threads)
    facts = {"by": "llama.cpp of llama-cpp-python 0.3.36", "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(facts | {"bytes": made.stat().st_size}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llama-quantize on lowbit's calibration ids")
    parser.add_argument("dense", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--type", required=True)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def measure(args: argparse.Namespace, context: int, text: str, matrix: Path) -> None:
    """Write the importance matrix of `text` to `matrix`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=matrix.parent) as folder:
        (said := Path(folder, "text.txt")).write_text(text, encoding="utf-8")
        made = Path(folder, "imatrix.gguf")
        run(args.bin, "llama-imatrix", "-m", args.dense, "-f", said, "-o", made, "-c", context, "-t", args.threads)
        made.replace(matrix)


def run(folder: Path, program: str, *arguments: Any) -> None:
    command = [str(folder / program), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"LD_LIBRARY_PATH": str(folder)}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-1500:]}")


if __name__ == "__main__":
    main()
