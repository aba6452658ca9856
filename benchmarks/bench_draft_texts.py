"""Texts with a drafter beside texts without: `python -m benchmarks.bench_draft_texts DRAFTER --commit HASH`.

A model is rounded to each scheme, and continues chats and code greedily and sampled: with drafts, up to 4 texts at a
time or one alone, and without. Every token must be the same. Rows go to benchmarks/results/draft_texts.jsonl.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lowbit
from benchmarks.bench_drafter import prompts
from benchmarks.measure import run_facts
from lowbit import engine
from lowbit.engine.drafts.gauge import as_wide_as_may_be
from lowbit.engine.drafts.widths import MOST_SEQUENCES
from lowbit.engine.engine import Engine
from lowbit.engine.sampling import Completion

RESULTS = Path(__file__).with_name("results") / "draft_texts.jsonl"
SCHEMES = ("int8", "fp8", "nvfp4-a16", "int8-a8", "mxfp4-a16", "int3-g64", "int2-g64", "mxfp8-a16", "nvfp4", "none")
WARM = {"temperature": 0.8, "seed": 1}


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> int:
    """The number of texts that are equal."""
    return sum(one.tokens == other.tokens for one, other in zip(found, expected, strict=True))


def texts_row(model: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of equal texts of a model with a drafter."""
    model.spaces.costs = as_wide_as_may_be()
    plain = Engine(model.decoder, None, replace(model.options, batch=MOST_SEQUENCES))
    count, few, new = arguments.prompts, arguments.alone, {"max_new_tokens": arguments.tokens, "ignore_eos": True}
    asked = [*prompts(model, "chat", count - count // 2), *prompts(model, "code", count // 2)]
    spread = asked[:: max(count // few, 1)][:few]
    expected, found = plain.generate(asked, **new), model.generate(asked, **new)
    alone = [model.generate([prompt], **new)[0] for prompt in spread]
    sampled = [model.generate([prompt], **new, **WARM)[0] for prompt in spread]
    row = {"prompts": count, "equal_with_head": same(found, expected), "together": MOST_SEQUENCES}
    row |= {"alone": few, "equal_alone": same(alone, plain.generate(spread, **new))}
    row |= {"sampled": few, "equal_sampled": same(sampled, plain.generate(spread, **new, **WARM))}
    written, steps = (sum(map(each, found)) for each in (lambda one: len(one.tokens), lambda one: one.steps))
    return row | {"tokens": arguments.tokens, "tokens_per_step": round(written / steps, 3)}


def main() -> None:
    """Rounds the model to each scheme, and compares texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    facts = run_facts(arguments.commit) if arguments.device == "cuda" else {"commit": arguments.commit}
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    with TemporaryDirectory() as directory, arguments.results.open("a") as file:
        for scheme in arguments.schemes:
            begun, place = time.monotonic(), arguments.model
            if scheme != "none":
                place = f"{directory}/{scheme}"
                settings = {"method": "rtn", "scheme": scheme}
                lowbit.quantize(arguments.model, place, device=arguments.device, eval_windows=0, **settings)
            model = engine.load(place, arguments.device, dtype, 1024, drafter=arguments.drafter)
            row = {"kind": "texts", "model": arguments.model, "scheme": scheme, "dtype": str(dtype).split(".")[1]}
            row |= texts_row(model, arguments) | {"seconds": round(time.monotonic() - begun, 1)} | facts
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
