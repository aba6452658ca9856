"""Tokens a step and a second with a drafter: `python -m benchmarks.bench_drafter DRAFTER --commit HASH`.

Greedy, one sequence at a time, on chats and code that the drafter has not seen: the held-out text, and modules that
benchmarks/train_drafter.py leaves out. `--shape llama3-8b` needs no drafter: weights are random, the head of EAGLE-3's
shape runs, and its drafts are right as often as said. Rows go to benchmarks/results/drafts.jsonl.
"""

import argparse
import html
import inspect
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import run_facts
from benchmarks.train_drafter import ASKS, SUBJECTS, TASKS
from lowbit import engine
from lowbit.calibrate.data import builtin_text
from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.drafter import Proposal
from lowbit.engine.drafts.heads import CHANCE, KIND, SPARE, Heads, Model
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.shapes import SHAPES, random_head, random_weights
from lowbit.engine.speed import measure_drafts

RESULTS = Path(__file__).with_name("results") / "drafts.jsonl"
PROSE_ASKS, CODE_ASKS = ASKS[:6], ASKS[6:]
UNSEEN = (html, json, statistics)
DRAFT_VOCABULARY = 32000


def prompts(model: Engine, kind: str, count: int) -> list[list[int]]:
    """Chats about prose or code."""
    chance, found = random.Random(5), list[list[int]]()
    prose = builtin_text("heldout")
    code = "\n".join(inspect.getsource(module) for module in UNSEEN).split("\n\n")
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


class Set(Heads):
    """A drafter whose drafts are right as often as said: the head runs, the tokens are those of known texts."""

    def know(self, texts: Sequence[list[int]], mean: float, most: int) -> None:
        """Draft these texts, `most` tokens a step, of which on average `mean` are right."""
        self.texts, self.right, self.asked = texts, mean, most
        self.chance, self.known = random.Random(0), dict[int, list[int]]()

    def begin(self, sequence: int, tokens: Sequence[int]) -> None:
        """See Drafter."""
        super().begin(sequence, tokens)
        self.known[sequence] = list(tokens)

    def extend(self, sequence: int, tokens: Sequence[int], features: torch.Tensor | None) -> None:
        """See Drafter."""
        super().extend(sequence, tokens, features)
        self.known[sequence] += tokens

    def propose(self, sequences: Sequence[int], most: int) -> list[Proposal]:
        """See Drafter."""
        super().propose(sequences, most)
        found = []
        for sequence in sequences:
            known = self.known[sequence]
            text = next(text for text in self.texts if text[: len(known)] == known)
            whole = int(self.right)
            right = whole + (self.chance.random() < self.right - whole)
            draft = text[len(known) : len(known) + most]
            wrong = [(token + 1) % 1000 for token in draft[right:]]
            found.append(Proposal((*draft[:right], *wrong), KIND, CHANCE))
        return found


def random_engine(shape: str, method: str, device: str, layers: int | None) -> Engine:
    """An engine with random weights, and a random head of EAGLE-3's shape in int8."""
    whole = SHAPES[shape]
    architecture = whole if layers is None else engine_with(whole, layers)
    like = torch.empty(0, dtype=torch.float16, device=device)
    weights = random_weights(architecture, method, like, "int8-channel")
    context = 2048 if layers is None else 128
    model = Model(architecture, weights.embedding, context + SPARE, weights.head)
    head = random_head(architecture, "int8", model, min(DRAFT_VOCABULARY, architecture.vocabulary))
    return Engine(Decoder(architecture, weights, context, head.taps), None, Options(context), head)


def engine_with(architecture: Any, layers: int) -> Any:
    """An architecture with fewer layers, to try this script."""
    return type(architecture)(**vars(architecture) | {"layers": architecture.layers[:layers]})


def shape_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a shape, by the number of drafts."""
    model = random_engine(arguments.shape, arguments.weights, arguments.device, arguments.layers)
    chance, rows = random.Random(3), list[dict[str, Any]]()
    asked = [[chance.randrange(1000) for _ in range(arguments.prompt)] for _ in range(2)]
    plain = model.generate(asked, max_new_tokens=arguments.output, ignore_eos=True, drafts=0)
    texts = [prompt + list(each.tokens) for prompt, each in zip(asked, plain, strict=True)]
    for drafts in (4, 7):
        with model.spaces.lent() as space, torch.inference_mode():
            space.roomy_reader(1, model.options.context)
            assert space.reader is not None
            forced = Set(model.spaces.head, 1, space.reader.cache.context, model.decoder.weights.embedding)
            forced.know(texts, arguments.right, drafts)
            space.drafts = forced
        speed = measure_drafts(model, asked, arguments.output, drafts=drafts)
        row = {"shape": arguments.shape, "weights": arguments.weights, "drafts": drafts, "prompt": arguments.prompt}
        rows.append(row | {"right_set": arguments.right} | speed.as_row())
    return rows


def model_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a model with its drafter, by the kind of text."""
    dtype = getattr(torch, arguments.dtype)
    model = engine.load(arguments.model, arguments.device, dtype, 1024, drafter=arguments.drafter)
    rows = list[dict[str, Any]]()
    for kind in ("chat", "code"):
        for drafts in (None, 4):
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
