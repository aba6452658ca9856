"""A published checkpoint in vLLM, by its id on the hub: its log-probabilities beside lowbit's own of the same files.

    python -m benchmarks.read_published REPO --vllm PYTHON

Both programs download REPO. PYTHON is that of an environment with vLLM. The windows are of evaluation's own text. Ends
with an error if the mean difference is beyond LIMIT nats a token.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch

import lowbit
from benchmarks.readers import HERE, ReaderError

WINDOWS, CONTEXT = 4, 128
LIMIT = 0.02  # bfloat16 in vLLM against float32 here makes 0.003 of mean loss on the demo model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo")
    parser.add_argument("--vllm", required=True, help="python of an environment with vLLM")
    args = parser.parse_args()
    score = lowbit.perplexity(args.repo, context=CONTEXT, windows=WINDOWS, keep=False).score
    rows = read_by_id(args.vllm, args.repo, [window.tolist() for window in score.cut.windows])
    theirs, ours = -float(torch.tensor(rows).mean()), score.nll
    print(f"{args.repo}: {theirs:.4f} nats a token in vLLM, {ours:.4f} in lowbit, on {score.tokens} tokens")
    if not abs(theirs - ours) < LIMIT:
        raise SystemExit(f"they differ by more than {LIMIT}")


def read_by_id(python: str, repo: str, windows: list[list[int]]) -> list[list[float]]:
    """The log-probabilities that vLLM gives the tokens of `windows`. ReaderError with its output if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "windows.json"), Path(scratch, "answers.jsonl")
        given.write_text(json.dumps(windows))
        command = [python, str(HERE / "peers" / "read_many.py"), repo, "--windows", str(given), "--out", str(out)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        answer = json.loads(out.read_text()) if out.exists() else {"error": done.stdout + done.stderr}
    if "error" in answer:
        raise ReaderError(answer["error"])
    return answer["rows"]


if __name__ == "__main__":
    main()
