"""Trains an EAGLE-3 head for a small model: `python -m benchmarks.train_drafter OUT --minutes 9` on a GPU.

The head learns on what the model itself writes, greedily and sampled: behind prompts for chats and code that are made
here of texts that ship with Python, and behind nothing, where it writes the user's part too. See
engine/drafts/training.py. It begins with the model's own head and last norm, for the tokens that the model writes most.
OUT gets config.json and model.safetensors in the layout in which such heads are published.
"""

import argparse
import inspect
import json
import random
import sys
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
from lowbit.engine.drafts.lessons import Lesson, Texts, Writer
from lowbit.engine.drafts.training import Eagle3, Plan, shares_of, train
from lowbit.engine.engine import Engine
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import model_directory

WRITING = 0.25  # share of the time in which texts are written
BYTES = {
    "cuda": 50_000_000_000,
    "cpu": 4_000_000_000,
}  # of all texts: a token's features take 4.6 kB for the demo model
PROMPT = 224  # most tokens of a prompt
WARMTHS = (0.0, 0.0, 0.7, 1.0)  # temperatures of texts, by turns
TOLD = 60  # seconds between two rows of a training
# modules whose code is in no prompt: benchmarks/bench_drafter.py asks about them
UNSEEN = ("html", "json", "statistics")
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
PROSE_ASKS, CODE_ASKS = ASKS[:6], ASKS[6:]
SUBJECT_LINES = """
    history, cooking, physics, the sea, money, music, health, travel, law, games, birds, old castles, bread, wine,
    gardens, cats, dogs, horses, the moon, stars, rivers, mountains, chess, football, tennis, swimming, running, poetry,
    novels, theatre, film, photography, drawing, sculpture, mathematics, chemistry, biology, geology, medicine,
    psychology, philosophy, religion, economics, trade, farming, fishing, ships, trains, aeroplanes, cars, bicycles,
    computers, programming, robots, the internet, radio, television, newspapers, schools, universities, teachers,
    children, families, friendship, love, dreams, memory, language, grammar, Spanish, Chinese, Rome, Egypt, Greece,
    India, Brazil, Africa, deserts, forests, flowers, bees, spiders, fish, whales, dinosaurs, volcanoes, earthquakes,
    storms, rain, snow, winter, summer, clothes, shoes, houses, bridges, kitchens, tea, coffee, cheese, chocolate,
    apples, rice, soup"""
SUBJECTS = tuple(subject.strip() for subject in SUBJECT_LINES.split(","))
TASKS = (
    "Tell me about {}.",
    "Write a poem about {}.",
    "How do I learn more about {}?",
    "List ten facts about {}.",
    "What is interesting about {}?",
    "Give me advice about {}.",
    "Explain {} to a child.",
    "Write an essay about {}.",
    "What are common mistakes with {}?",
    "Make a plan to study {} in a week.",
    "Write a Python program about {}.",
    "Write a class in Python for {}.",
)


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


def modules() -> Iterator[str]:
    """The source of Python's own modules, without those of UNSEEN."""
    root = Path(inspect.__file__).parent
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/[a-z]*.py")]):
        named = {path.stem, *path.relative_to(root).parts}
        if not named & {*UNSEEN, "encodings", "site-packages", "test", "tests", "this"}:
            yield path.read_text(errors="replace")


def asks(chance: random.Random) -> Iterator[str]:
    """Endless messages of users: about prose, about code, and about nothing at hand."""
    prose, source = builtin_text("calibration"), list(modules())
    code = "\n".join(source).split("\n\n")
    told = [text for module in source for text in module.split('"""')[1::2] if len(text) > 200]
    while True:
        drawn = chance.random()
        if drawn < 0.15:
            yield chance.choice(TASKS).format(chance.choice(SUBJECTS))
        elif drawn < 0.5:
            text = chance.choice((prose, chance.choice(told)))
            at = chance.randrange(max(len(text) - 500, 1))
            yield chance.choice(PROSE_ASKS).format(text[at : at + chance.randrange(60, 600)].strip())
        else:
            place = chance.randrange(len(code))
            yield chance.choice(CODE_ASKS).format("\n\n".join(code[place : place + 2])[:800].strip())


def prompts_of(model: Engine, source: Iterator[str], chance: random.Random, count: int) -> list[list[int]]:
    """Chats of at most PROMPT tokens. One of five ends where the user's message begins."""
    found, opening = list[list[int]](), opening_of(model)
    while len(found) < count:
        tokens = opening
        if chance.random() > 0.2:
            tokens = model.encode_chat([{"role": "user", "content": next(source)}])
        if len(tokens) <= PROMPT:
            found.append(list(tokens))
    return found


def opening_of(model: Engine) -> list[int]:
    """A chat up to the user's message."""
    one, other = (model.encode_chat([{"role": "user", "content": text}]) for text in ("One", "Two"))
    return one[: next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])]


def written_for(model: Engine, writer: Writer, tokens: int, seconds: float) -> list[Texts]:
    """Texts that the model writes in so many seconds."""
    chance, found, end = random.Random(0), list[Texts](), time.monotonic() + seconds
    source, most = asks(chance), BYTES[model.decoder.weights.device.type]
    while time.monotonic() < end and sum(texts.nbytes for texts in found) < most:
        prompts, opening = prompts_of(model, source, chance, writer.most), opening_of(model)
        warm = [chance.choice(WARMTHS[2:] if prompt == opening else WARMTHS) for prompt in prompts]
        found.append(writer.write(prompts, tokens, warm, seed=len(found) * writer.most))
        if len(found) % 10 == 1:
            print(json.dumps({"written": len(found) * writer.most * tokens}), flush=True)
    return found


def frequent(texts: Sequence[Texts], vocabulary: int, count: int) -> Tensor:
    """The tokens that were written most, in order."""
    counted = torch.bincount(torch.cat([each.written.flatten() for each in texts]), minlength=vocabulary)
    return counted.topk(min(count, vocabulary)).indices.sort().values


def telling(head: Eagle3, held: Sequence[Lesson], steps: int) -> Any:
    """A function that prints a training's right proposals in these lessons from time to time, given its step."""
    begun, told = time.monotonic(), 0

    def tell(step: int) -> None:
        nonlocal told
        seconds = time.monotonic() - begun
        if seconds > (told + 1) * TOLD:
            told += 1
            right = [round(share, 3) for share in shares_of(head, held, steps)]
            print(json.dumps({"seconds": round(seconds), "step": step, "right": right}), flush=True)

    return tell


@torch.no_grad()
def begin(head: Eagle3, directory: Path, targets: Tensor) -> None:
    """Let the head begin with the model's final norm, and its own head's rows for these tokens. With AdamW, 48% of
    first drafts were right after 40 s of training on a shared H200; 43% of a head that began at random."""
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
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tokens", type=int, default=192, help="of each text")
    parser.add_argument("--together", type=int, default=512, help="texts that are written at a time")
    parser.add_argument("--rows", type=int, default=32, help="texts of a step of the optimizer")
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--draft-vocabulary", type=int, default=24576)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    directory, begun = model_directory(arguments.model), time.monotonic()
    context = PROMPT + arguments.tokens
    model = engine.load(directory, arguments.device, context=context)
    config = config_for(json.loads((directory / "config.json").read_text()), arguments.draft_vocabulary)
    taps = eagle_taps(config, len(model.decoder.architecture.layers))
    writer = Writer(model, taps, arguments.together, context)
    texts = written_for(model, writer, arguments.tokens, WRITING * 60 * arguments.minutes)
    row: dict[str, Any] = {"written": sum(each.written.numel() for each in texts)}
    targets, lessons = frequent(texts, config["vocab_size"], config["draft_vocab_size"]), list[Lesson]()
    while texts:  # each batch is freed as its lessons are made
        lessons += writer.lessons(texts.pop(), targets, arguments.rows)
    torch.manual_seed(0)
    head = Eagle3(config, model.decoder.weights.embedding.float()).to(arguments.device)
    begin(head, directory, targets)
    row["writing"] = round(time.monotonic() - begun, 1)
    plan = Plan(60 * arguments.minutes - (time.monotonic() - begun), arguments.rate)
    right = train(head, lessons, plan, telling(head, lessons[:1], plan.steps))
    write_head(head, config, targets.cpu(), arguments.out)
    row |= {"right": [round(share, 3) for share in right]}
    row |= {"minutes": round((time.monotonic() - begun) / 60, 2), "argv": sys.argv[1:]}
    (arguments.out / "training.json").write_text(json.dumps(row))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
