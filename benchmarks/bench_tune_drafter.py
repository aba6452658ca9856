"""Tokens a step of a head before and after `quantize --drafter`: `python -m benchmarks.bench_tune_drafter DRAFTER`.

The model is rounded to each scheme; its head, trained with the unquantized model, is measured behind prompts that are
not learned, then tuned on text that the result writes. Rows go to benchmarks/results/drafter_tuning.jsonl.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import lowbit
from benchmarks.measure import run_facts

RESULTS = Path(__file__).with_name("results") / "drafter_tuning.jsonl"


def main() -> None:
    """Rounds, tunes and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--schemes", nargs="+", default=["int4-g64", "int3-g64", "int2-g64"])
    parser.add_argument("--steps", nargs="+", type=int, default=[200, 600])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    facts = run_facts(arguments.commit) if arguments.device == "cuda" else {"commit": arguments.commit}
    with TemporaryDirectory() as directory, arguments.results.open("a") as file:
        for scheme in arguments.schemes:
            place = Path(directory) / scheme
            lowbit.quantize(
                arguments.model, place, method="rtn", scheme=scheme, device=arguments.device, eval_windows=0
            )
            for steps in arguments.steps:
                begun, out = time.monotonic(), Path(directory) / f"{scheme}-{steps}"
                how = {"device": arguments.device, "steps": steps}
                tuned = lowbit.tune_drafter(place, arguments.drafter, out, **how)
                row = {"model": arguments.model, "method": "rtn", "scheme": scheme, "steps": steps}
                row |= {"before": round(tuned.before, 3), "after": round(tuned.after, 3)}
                row |= {"right": tuned.row["right"], "seconds": round(time.monotonic() - begun, 1)} | facts
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
