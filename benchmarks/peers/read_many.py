"""Log-probabilities that vLLM gives the tokens of some windows, for many checkpoints in one process.

    PYTHON read_many.py CHECKPOINT... --windows FILE --out FILE [--dtype bfloat16] [--reader vllm-lowbit]

As read_checkpoint.py, whose reading this is, and whose READER. The output is a line of JSON a checkpoint, written as
soon as it is known: {"checkpoint": ..., "rows": ...}, or {"checkpoint": ..., "error": ...} with what vLLM raised. A
checkpoint that ends the process has no line.
"""

import argparse
import json
import os
from pathlib import Path

import torch

# torchvision on PyPI is built for CUDA. Beside a torch without it, it lacks the operators that it describes on import;
# models that see images import it, and use none of these.
VISION = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    VISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# Compiled code would run once: on a CPU that costs more than a small model takes.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from read_checkpoint import with_vllm  # noqa: E402  # vLLM asks for both of the above


def main() -> None:
    parser = argparse.ArgumentParser(description="many checkpoints in vLLM")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--windows", type=Path, required=True, help="JSON: token ids of each window")
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON a checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--reader", choices=["vllm", "vllm-lowbit"], default="vllm")
    args = parser.parse_args()
    windows = json.loads(args.windows.read_text())
    with args.out.open("a") as out:
        for checkpoint in args.checkpoints:
            found = read(checkpoint, args.reader, args.dtype, windows)
            out.write(json.dumps({"checkpoint": checkpoint} | found) + "\n")
            out.flush()


def read(checkpoint: str, reader: str, dtype: str, windows: list[list[int]]) -> dict[str, object]:
    """The log-probabilities under "rows", or under "error" what was raised; the engine is gone afterwards."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # a process of its own would import vLLM again
    options = argparse.Namespace(checkpoint=checkpoint, reader=reader, dtype=dtype, split=1, lora=None)
    try:
        return {"rows": with_vllm(options, windows)}
    except Exception as error:  # noqa: BLE001  # whatever vLLM raises is what it says of the checkpoint
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
