"""Trains an EAGLE-3 head for a small model: `python -m benchmarks.train_drafter OUT --minutes 10` on a GPU.

The head learns on what the model itself writes, greedily and sampled, after prompts for chats and code that are made
here of texts that ship with Python: see engine/drafts/training.py. It begins with the model's own head and last norm,
for the tokens that the model writes most. OUT gets config.json and model.safetensors in the layout in which such heads
are published.
"""

import argparse
import ast
import csv
import difflib
import heapq
import inspect
import json
import random
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit import engine
from lowbit.calibrate.data import builtin_text
from lowbit.engine.drafts.eagle import eagle_taps
from lowbit.engine.drafts.training import BATCH, Eagle3, Plan, Teacher, Text, train, write_texts
from lowbit.engine.engine import Engine
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import model_directory

WRITING = 0.2  # share of the time in which texts are written
MOST_TOKENS = 6_000_000  # of all texts: a token's features take 3.5 kB for the demo model
PROMPT = 256  # most tokens of a prompt
WARMTH = 0.8  # temperature of every second text; the others are greedy
MODULES = (argparse, ast, csv, difflib, heapq, inspect, random, shlex, textwrap)
ASKS = (
    "Explain in simple words: {}",
    "What is meant by this? {}",
    "Summarize the following text.\n\n{}",
    "Write a short story that begins like this: {}",
    "Rewrite this as a list of points:\n{}",
    "Give me three questions about this text, with their answers.\n{}",
    "Write a Python function for this task: {}",
    "What does this code do?\n\n{}",
    "Write a docstring for this function:\n\n{}",
    "Continue this code:\n\n{}",
    "Find mistakes in this code and write it again:\n\n{}",
    "Write tests for this code:\n\n{}",
)
SUBJECTS = ("history", "cooking", "physics", "the sea", "money", "music", "health", "travel", "law", "games", "birds")
TASKS = ("Tell me about {}.", "Write a poem about {}.", "How do I learn more about {}?", "List ten facts about {}.")


def taps_of(layers: int) -> tuple[int, int, int]:
    """The layers before which features are taken, as published heads take them."""
    return 2, layers // 2, layers - 3


def config_for(target: Mapping[str, Any], draft_vocabulary: int) -> dict[str, Any]:
    """The configuration of a head for a model with this one. The residual is the normed feature: features are some
    hundred times as large as what a layer that begins at random adds to them."""
    copied = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    return {name: target[name] for name in (*copied, "max_position_embeddings", "vocab_size")} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "head_dim": target.get("head_dim") or target["hidden_size"] // target["num_attention_heads"],
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "draft_vocab_size": draft_vocabulary,
        "norm_before_residual": True,
        "tie_word_embeddings": False,
    }


def write_head(head: Eagle3, config: dict[str, Any], targets: Tensor, directory: Path) -> None:
    """Write a head in the layout in which such heads are published."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous().cpu() for name, value in head.state_dict().items()}
    tensors["d2t"] = (targets - torch.arange(len(targets))).to(torch.int64)
    known = torch.zeros(config["vocab_size"], dtype=torch.bool)
    known[targets] = True
    tensors["t2d"] = known
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def asks(chance: random.Random) -> Iterator[str]:
    """Endless messages of users: about prose, about code, and about nothing at hand."""
    prose = builtin_text("calibration")
    code = "\n".join(inspect.getsource(module) for module in MODULES).split("\n\n")
    while True:
        drawn = chance.random()
        if drawn < 0.3:
            yield chance.choice(TASKS).format(chance.choice(SUBJECTS))
            continue
        at = chance.randrange(len(prose) - 1000)
        if drawn < 0.65:
            text = prose[at : at + chance.randrange(60, 600)]
        else:
            place = chance.randrange(len(code))
            text = "\n\n".join(code[place : place + 2])[:800]
        yield chance.choice(ASKS).format(text.strip())


def prompts_of(model: Engine, source: Iterator[str], count: int) -> list[list[int]]:
    """Chats of at most PROMPT tokens."""
    found = list[list[int]]()
    while len(found) < count:
        tokens = model.encode_chat([{"role": "user", "content": next(source)}])
        if len(tokens) <= PROMPT:
            found.append(tokens)
    return found


def written_for(model: Engine, tokens: int, seconds: float) -> list[Text]:
    """Texts that the model writes in so many seconds."""
    source, texts, end = asks(random.Random(0)), list[Text](), time.monotonic() + seconds
    while time.monotonic() < end and sum(len(text.tokens) for text in texts) < MOST_TOKENS:
        texts += write_texts(model, prompts_of(model, source, 4 * BATCH), tokens, WARMTH)
        print(f"{len(texts)} texts, {written(texts)} tokens", flush=True)
    return texts


def written(texts: Sequence[Text]) -> int:
    """The tokens that the model wrote."""
    return sum(len(text.tokens) - text.prompt for text in texts)


def frequent(texts: Sequence[Text], vocabulary: int, count: int) -> Tensor:
    """The tokens that were written most, in order."""
    counted = torch.bincount(
        torch.tensor([token for text in texts for token in text.tokens[text.prompt :]]), minlength=vocabulary
    )
    return counted.topk(min(count, vocabulary)).indices.sort().values


@torch.no_grad()
def begin(head: Eagle3, directory: Path, targets: Tensor) -> None:
    """Let the head begin with the model's final norm, and its own head's rows for these tokens. After 40 s of training
    on a shared H200, 48% of first drafts were right; with a norm scaled so that the first logits deviate by 1 it was
    42%, and 43% of a head that began at random."""
    tensors = LogicalTensors(open_checkpoint(directory))
    known = set(tensors.names)
    name = "lm_head.weight" if "lm_head.weight" in known else "model.embed_tokens.weight"
    head.lm_head.weight.copy_(tensors.read(name)[targets.cpu()])
    head.norm.weight.copy_(tensors.read("model.norm.weight"))


def main() -> None:
    """Writes texts, then trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--draft-vocabulary", type=int, default=12288)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    directory, begun = model_directory(arguments.model), time.monotonic()
    model = engine.load(directory, arguments.device, context=PROMPT + arguments.tokens)
    texts = written_for(model, arguments.tokens, WRITING * 60 * arguments.minutes)
    config = config_for(json.loads((directory / "config.json").read_text()), arguments.draft_vocabulary)
    targets = frequent(texts, config["vocab_size"], config["draft_vocab_size"]).to(arguments.device)
    taps = eagle_taps(config, len(model.decoder.architecture.layers))
    lessons = Teacher(model, taps, targets).lessons(texts, arguments.rows)
    torch.manual_seed(0)
    head = Eagle3(config, model.decoder.weights.embedding.float()).to(arguments.device)
    begin(head, directory, targets)
    plan = Plan(60 * arguments.minutes - (time.monotonic() - begun), arguments.rate)
    right = train(head, lessons, plan)
    write_head(head, config, targets.cpu(), arguments.out)
    row = {"texts": len(texts), "written": written(texts), "right": [round(share, 3) for share in right]}
    row |= {"minutes": round((time.monotonic() - begun) / 60, 2), "argv": sys.argv[1:]}
    (arguments.out / "training.json").write_text(json.dumps(row))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
