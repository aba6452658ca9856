"""Tokens per step with drafts from text: `python -m benchmarks.bench_lookup --commit HASH`.

Greedy, with the demo model or another, on texts that ship with Python: the standard library's source, and the builtin
held-out documentation; `repeat` begins to write the source of its prompt again. `edits` needs no model: the text to be
written is given, the prompt's file with changes, and the steps are those of a model that writes it. One row per kind
and number of drafts in benchmarks/results/lookup.jsonl. It counts steps, so it needs no GPU; the number of drafts is
chosen by what rows cost on one.
"""

import argparse
import inspect
import json
import random
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from lowbit import engine
from lowbit.calibrate.data import builtin_text
from lowbit.engine.drafts.drafting import accepted
from lowbit.engine.drafts.gauge import Costs, Gauge
from lowbit.engine.drafts.suffix import Suffixes
from lowbit.engine.drafts.widths import WIDTHS
from lowbit.engine.engine import Engine

RESULTS = Path(__file__).with_name("results") / "lookup.jsonl"
MODULES = (argparse, inspect, json)
PROMPT, OUTPUT, DRAFTS = 384, 96, (3, 7)
FILE = 2048  # tokens of an edited file
A_ROW = 0.026  # of a step: 8 rows took 1.18 times one row's time on an H200, Llama-2-7B W4, 128 positions
COSTS = Costs({(1, width): 1 + A_ROW * (width - 1) for width in range(1, 9)}, fixed=True)


def prompts(model: Engine, kind: str) -> list[list[int]]:
    """The prompts of several texts."""
    if kind == "prose":
        text = builtin_text("heldout")
        texts = [text[i * len(text) // len(MODULES) :] for i in range(len(MODULES))]
    else:
        texts = [inspect.getsource(module) for module in MODULES]
    files = [model.encode(text[: 8 * PROMPT])[:PROMPT] for text in texts]
    if kind == "repeat":
        again = model.encode("\n\n# The same file again:\n")
        return [file + again + file[:16] for file in files]
    return files


def edited(source: str, chance: random.Random) -> str:
    """A file with changes: three names are others everywhere, and of 20 lines one is left out, and one is new."""
    names = sorted(set(re.findall(r"\b[a-z_]{5,}\b", source)))
    for name in chance.sample(names, 3):
        source = re.sub(rf"\b{name}\b", f"new_{name}", source)
    lines = list[str]()
    for line in source.splitlines(keepends=True):
        drawn = chance.randrange(20)
        if drawn == 0:
            continue
        lines.append(line)
        if drawn == 1:
            lines.append(f"{line[: len(line) - len(line.lstrip())]}{chance.choice(names)} = {chance.choice(names)}\n")
    return "".join(lines)


def steps_of_edits(model: Engine, drafts: int) -> Iterator[tuple[int, int]]:
    """Tokens and steps of several edited files, with the original as the prompt."""
    chance = random.Random(0)
    for module in MODULES:
        file = model.require_tokenizer().decode(model.encode(inspect.getsource(module))[:FILE])
        yield steps_of(model.encode(file), model.encode(edited(file, chance)), drafts)


def steps_of(prompt: list[int], output: list[int], drafts: int) -> tuple[int, int]:
    """Tokens of an output, and the steps in which a model that writes it does so."""
    drafter, gauge, done, steps = Suffixes(), Gauge(COSTS), 1, 1
    drafter.begin(0, [*prompt, output[0]])
    while done < len(output):
        [proposal] = drafter.propose([0], min(drafts, len(output) - done - 1))
        draft = proposal.tokens[: gauge.width([proposal], [w for w in WIDTHS if w <= 1 + drafts]) - 1]
        kept = accepted(draft, output[done : done + 1 + len(draft)])
        gauge.note(proposal, len(draft), len(kept) - 1)
        drafter.extend(0, kept, None)
        done, steps = done + len(kept), steps + 1
    return done, steps


def counts(model: Engine, kind: str, drafts: int) -> tuple[int, int, int]:
    """Tokens of the prompts, and those that were written, in so many steps."""
    if kind == "edits":
        done = list(steps_of_edits(model, drafts))
        return FILE, sum(tokens for tokens, _ in done), sum(steps for _, steps in done)
    asked = prompts(model, kind)
    texts = [model.generate(each, max_new_tokens=OUTPUT, lookup=drafts, ignore_eos=True)[0] for each in asked]
    return len(asked[0]), sum(len(each.tokens) for each in texts), sum(each.steps for each in texts)


def main() -> None:
    """Measures every kind of text with every number of drafts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--text", action="append", choices=("edits", "code", "prose", "repeat"))
    arguments = parser.parse_args()
    model = engine.load(arguments.model)
    model.spaces.costs = COSTS
    with RESULTS.open("a") as file:
        for kind in arguments.text or ("edits", "code", "prose", "repeat"):
            for drafts in DRAFTS:
                prompt, tokens, steps = counts(model, kind, drafts)
                row = {"model": arguments.model, "text": kind, "drafts": drafts, "prompt": prompt}
                row |= {"tokens": tokens, "steps": steps, "tokens_per_step": round(tokens / steps, 3)}
                row |= {"commit": arguments.commit, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
