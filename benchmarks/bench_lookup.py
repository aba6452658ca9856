"""Tokens per step with prompt lookup, on code and on prose: `python -m benchmarks.bench_lookup --commit HASH`.

Greedy, with the demo model or another, on texts that ship with Python: the standard library's source, and the builtin
held-out documentation. One row per kind and number of drafts in benchmarks/results/lookup.jsonl. It counts steps, so it
needs no GPU.
"""

import argparse
import inspect
import json
from datetime import UTC, datetime
from pathlib import Path

from lowbit import engine
from lowbit.calibrate.data import builtin_text
from lowbit.engine.engine import Engine

RESULTS = Path(__file__).with_name("results") / "lookup.jsonl"
MODULES = (argparse, inspect, json)
PROMPT, OUTPUT, DRAFTS = 384, 96, (3, 7)


def prompts(model: Engine, kind: str) -> list[list[int]]:
    """The first PROMPT tokens of several texts."""
    if kind == "code":
        texts = [inspect.getsource(module) for module in MODULES]
    else:
        text = builtin_text("heldout")
        texts = [text[i * len(text) // len(MODULES) :] for i in range(len(MODULES))]
    return [model.encode(text[: 8 * PROMPT])[:PROMPT] for text in texts]


def main() -> None:
    """Measures code and prose with every number of drafts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    model = engine.load(arguments.model)
    with RESULTS.open("a") as file:
        for kind in ("code", "prose"):
            for drafts in DRAFTS:
                done = model.generate(prompts(model, kind), max_new_tokens=OUTPUT, lookup=drafts, ignore_eos=True)
                tokens, steps = sum(len(each.tokens) for each in done), sum(each.steps for each in done)
                row = {"model": arguments.model, "text": kind, "drafts": drafts, "prompt": PROMPT, "output": OUTPUT}
                row |= {"tokens": tokens, "steps": steps, "tokens_per_step": round(tokens / steps, 3)}
                row |= {"commit": arguments.commit, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
                file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
