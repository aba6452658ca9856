"""Tokens a step and a second with a drafter: `python -m benchmarks.bench_drafter DRAFTER --commit HASH`.

Greedy, one sequence at a time, on chats and code that the drafter has not seen: subjects and modules that
benchmarks/train_drafter.py leaves out, and the held-out text. `--shape llama3-8b` needs no drafter: weights are random,
the head of EAGLE-3's shape runs, and its drafts are right as often as said. Rows go to benchmarks/results/drafts.jsonl.
"""

import argparse
import inspect
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import run_facts
from benchmarks.train_drafter import CODE_ASKS, PROSE_ASKS, TASKS, UNSEEN
from lowbit import engine
from lowbit.calibrate.data import builtin_text
from lowbit.engine.architecture import Architecture
from lowbit.engine.cache import Cache
from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.gauge import Costs, as_wide_as_may_be
from lowbit.engine.drafts.heads import SPARE, Head, Model
from lowbit.engine.engine import Engine
from lowbit.engine.layers import Block
from lowbit.engine.options import Options
from lowbit.engine.shapes import SHAPES, random_head, random_weights
from lowbit.engine.speed import measure_drafts
from lowbit.engine.step import Step

RESULTS = Path(__file__).with_name("results") / "drafts.jsonl"
SUBJECTS = (
    *("painting", "sleep", "trees", "the weather", "clocks", "islands", "gold", "elections", "dancing", "bacteria"),
    "paper",
)
DRAFT_VOCABULARY = 32000


def prompts(model: Engine, kind: str, count: int) -> list[list[int]]:
    """Chats about prose or code."""
    chance, found = random.Random(5), list[list[int]]()
    prose = builtin_text("heldout")
    code = "\n".join(inspect.getsource(import_module(name)) for name in UNSEEN).split("\n\n")
    while len(found) < count:
        if kind == "code":
            place = chance.randrange(len(code) - 1)
            text = chance.choice(CODE_ASKS).format("\n\n".join(code[place : place + 2])[:800].strip())
        elif chance.random() < 0.5:
            text = chance.choice(TASKS).format(chance.choice(SUBJECTS))
        else:
            at = chance.randrange(len(prose) - 600)
            text = chance.choice(PROSE_ASKS).format(prose[at : at + 400].strip())
        found.append(model.encode_chat([{"role": "user", "content": text}]))
    return found


@dataclass(frozen=True)
class SetHead:
    """A head whose drafts are right as often as said: the head runs, the tokens are those of a known text.

    text   (positions) int64  the text to draft, written to it when it is known
    right  (positions) int64  right drafts behind each position
    """

    head: Head
    text: Tensor
    right: Tensor

    @property
    def architecture(self) -> Architecture:
        """See Head."""
        return self.head.architecture

    @property
    def taps(self) -> tuple[int, ...]:
        """See Head."""
        return self.head.taps

    @property
    def most(self) -> int:
        """See Head."""
        return self.head.most

    @property
    def blocks(self) -> tuple[Block, ...]:
        """See Head."""
        return self.head.blocks

    def planned(self) -> "SetHead":
        """See Head."""
        return replace(self, head=self.head.planned())

    def read(self, taken: Tensor, step: Step, cache: Cache) -> None:
        """See Head."""
        self.head.read(taken, step, cache)

    def draft(self, taken: Tensor, step: Step, last: Tensor, most: int, cache: Cache) -> Tensor:
        """See Head. The pair at position i has token i + 1, so that the first draft is token i + 2."""
        self.head.draft(taken, step, last, most, cache)
        places, counted = step.positions[last].unsqueeze(1), torch.arange(most, device=last.device)
        known = self.text[places + 2 + counted]
        return torch.where(counted < self.right[places], known, (known + 1) % 1000)


def right_drafts(mean: float, positions: int, device: torch.device) -> Tensor:
    """Numbers of right drafts, `mean` on average: the whole numbers below and above it."""
    chance, whole = random.Random(0), int(mean)
    found = [whole + (chance.random() < mean - whole) for _ in range(positions)]
    return torch.tensor(found, device=device)


def random_engines(arguments: argparse.Namespace) -> Iterator[tuple[str, Engine]]:
    """An engine with random weights, and random heads of EAGLE-3's shape of these number types."""
    whole, layers = SHAPES[arguments.shape], arguments.layers
    architecture = whole if layers is None else engine_with(whole, layers)
    like = torch.empty(0, dtype=torch.float16, device=arguments.device)
    weights = random_weights(architecture, arguments.weights, like, "int8-channel")
    context = 2048 if layers is None else 256
    model = Model(architecture, weights.embedding, context + SPARE, weights.head)
    for method in arguments.heads:
        head = random_head(architecture, method, model, min(DRAFT_VOCABULARY, architecture.vocabulary))
        text = torch.zeros(context + SPARE, dtype=torch.int64, device=arguments.device)
        known = SetHead(head, text, right_drafts(arguments.right, context, like.device))
        yield method, Engine(Decoder(architecture, weights, context, head.taps), None, Options(context), known)


def engine_with(architecture: Any, layers: int) -> Any:
    """An architecture with fewer layers, to try this script."""
    return type(architecture)(**vars(architecture) | {"layers": architecture.layers[:layers]})


def shape_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a shape, by the number of drafts."""
    chance, rows = random.Random(3), list[dict[str, Any]]()
    prompt = [chance.randrange(1000) for _ in range(arguments.prompt)]
    for method, model in random_engines(arguments):
        assert isinstance(model.spaces.head, SetHead)
        [plain] = model.generate([prompt], max_new_tokens=arguments.output, ignore_eos=True, drafts=0)
        model.spaces.head.text[: len(prompt) + arguments.output] = torch.tensor([*prompt, *plain.tokens])
        for drafts in (3, 4, 7):
            speed = measure_drafts(model, [prompt] * 2, arguments.output, drafts=drafts)
            row = {"shape": arguments.shape, "weights": arguments.weights, "head": method, "drafts": drafts}
            row |= {"prompt": arguments.prompt, "right_set": arguments.right}
            rows.append(row | speed.as_row())
            print(json.dumps(rows[-1]), flush=True)
    return rows


def model_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a model with its drafter, by the kind of text. A number of drafts is checked whatever it costs; without
    one it is chosen as always."""
    dtype = getattr(torch, arguments.dtype)
    model = engine.load(arguments.model, arguments.device, dtype, 1024, drafter=arguments.drafter)
    rows = list[dict[str, Any]]()
    for kind in ("chat", "code"):
        for drafts in (7, 4, None):
            model.spaces.costs = Costs() if drafts is None else as_wide_as_may_be()
            speed = measure_drafts(model, prompts(model, kind, arguments.prompts), arguments.output, drafts=drafts)
            row = {"model": Path(arguments.model).name, "drafter": Path(arguments.drafter).name, "text": kind}
            rows.append(row | {"drafts": drafts, "dtype": arguments.dtype} | speed.as_row())
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measures a drafter, or a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", nargs="?", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--weights", default="w4")
    parser.add_argument("--heads", nargs="+", default=["int8", "w4"], help="number types of the head, with --shape")
    parser.add_argument("--right", type=float, default=2.2, help="right drafts a step, with --shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, with --shape")
    parser.add_argument("--output", type=int, default=192)
    parser.add_argument("--layers", type=int, help="layers of the shape, to try this script")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    facts = run_facts(arguments.commit) if arguments.device == "cuda" else {"commit": arguments.commit}
    rows = shape_rows(arguments) if arguments.shape else model_rows(arguments)
    with arguments.results.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | facts) + "\n")
            print(json.dumps(row | facts), flush=True)


if __name__ == "__main__":
    main()
