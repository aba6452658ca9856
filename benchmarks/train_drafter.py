"""Trains an EAGLE-3 head for a small model: `python -m benchmarks.train_drafter OUT --minutes 8` on a GPU.

The head learns on what the model itself writes, greedily and sampled, after prompts for chats and code that are made
here of texts that ship with Python. It is unrolled over its own features as in drafting, and learns the model's
distribution over the tokens that the model writes most. It begins with the model's own head and last feed-forward. OUT
gets config.json and model.safetensors in the layout in which such heads are published.
"""

import argparse
import ast
import csv
import difflib
import heapq
import inspect
import json
import math
import random
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowbit.calibrate.data import builtin_text
from lowbit.models.source import model_directory

DECAY = 0.9  # of the loss, a step
WARM = 100  # steps until the learning rate is whole
WRITING = 0.35  # share of the time in which texts are written
KEPT_GIB = 32  # of features: texts beyond them are left out
HELD_OUT = 20  # of so many batches, one is not trained on
PROMPT = 256  # most tokens of a prompt
SAMPLED = 0.5  # share of texts that are sampled at temperature 0.8; the others are greedy
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


@dataclass(frozen=True)
class Plan:
    """Settings of a training.

    rate    highest learning rate
    steps   of the head's own features
    copied  True: the head begins with the model's final norm and head, and with the feed-forward of its last layer
    """

    rate: float = 1e-3
    steps: int = 5
    copied: bool = True


@dataclass(frozen=True)
class Batch:
    """Texts of the model, padded.

    tokens   (B, T)
    written  (B, T) bool  the model wrote this token
    taken    (B, T, 3 hidden)  features of the model
    last     (B, T, hidden)  its normed output
    """

    tokens: Tensor
    written: Tensor
    taken: Tensor
    last: Tensor


class Eagle3(nn.Module):
    """The head in plain torch, its tensors named as in published files.

    config  of the head: see `config_for`
    """

    def __init__(self, config: dict[str, Any], embedding: Tensor) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.eps, self.theta = config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
        self.embedding = embedding

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        attention = {name: linear(2 * hidden, self.kv_heads * self.head_dim) for name in ("k_proj", "v_proj")}
        attention["q_proj"] = linear(2 * hidden, self.heads * self.head_dim)
        attention["o_proj"] = linear(self.heads * self.head_dim, hidden)
        mlp = {"gate_proj": linear(hidden, inner), "up_proj": linear(hidden, inner), "down_proj": linear(inner, hidden)}
        norms = {name: nn.RMSNorm(hidden, self.eps) for name in ("hidden_norm", "input_layernorm")}
        norms["post_attention_layernorm"] = nn.RMSNorm(hidden, self.eps)
        self.midlayer = nn.ModuleDict({"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp), **norms})
        self.fc = linear(3 * config.get("target_hidden_size", hidden), hidden)
        self.norm = nn.RMSNorm(hidden, self.eps)
        self.lm_head = linear(hidden, config["draft_vocab_size"])

    def turned(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Heads (B, T, heads, head_dim) rotated by their positions (T)."""
        half = self.head_dim // 2
        frequencies = self.theta ** (-torch.arange(half, device=heads.device).float() / half)
        angles = positions.float().unsqueeze(1) * frequencies
        cosines, sines = (each.unsqueeze(1).to(heads.dtype) for each in (angles.cos(), angles.sin()))
        low, high = heads.chunk(2, -1)
        return torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1)

    def forward(self, tokens: Tensor, features: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The features (B, T, hidden) of the next positions.

        tokens    (B, T), each with the feature (B, T, hidden) of the position before
        earlier   keys and values (B, T, kv heads, head_dim) of each step before this one; this step's are appended.
                  Row t sees those of the first step up to t, and of later steps its own
        """
        layer, step = self.midlayer, len(earlier)
        embedded = functional.embedding(tokens, self.embedding).to(features.dtype)
        x = torch.cat([layer["input_layernorm"](embedded), layer["hidden_norm"](features)], -1)
        positions = torch.arange(tokens.shape[1], device=tokens.device) + step
        q, k, v = (layer["self_attn"][f"{name}_proj"](x).unflatten(-1, (-1, self.head_dim)) for name in ("q", "k", "v"))
        q, k = self.turned(q, positions), self.turned(k, positions)
        earlier.append((k, v))
        h = features + layer["self_attn"]["o_proj"](self.attend(q, earlier).flatten(2))
        y = layer["post_attention_layernorm"](h)
        return h + layer["mlp"]["down_proj"](functional.silu(layer["mlp"]["gate_proj"](y)) * layer["mlp"]["up_proj"](y))

    def attend(self, q: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attention (B, T, heads, head_dim)."""
        groups, scale, count = self.heads // self.kv_heads, self.head_dim**-0.5, q.shape[1]
        many = [[part.repeat_interleave(groups, 2) for part in pair] for pair in earlier]
        seen = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
        scores = torch.einsum("bthd,bshd->bhts", q, many[0][0]).masked_fill(~seen, float("-inf"))
        own = [torch.einsum("bthd,bthd->bht", q, k).unsqueeze(-1) for k, _ in many[1:]]
        weights = (torch.cat([scores, *own], -1).float() * scale).softmax(-1).to(q.dtype)
        out = torch.einsum("bhts,bshd->bthd", weights[..., :count], many[0][1])
        for number, (_, v) in enumerate(many[1:]):
            out = out + weights[..., count + number].transpose(1, 2).unsqueeze(-1) * v
        return out

    def logits(self, features: Tensor) -> Tensor:
        """The logits (B, T, draft vocabulary) behind features."""
        return self.lm_head(self.norm(features))


def taps_of(layers: int) -> tuple[int, int, int]:
    """The layers before which features are taken, as published heads take them."""
    return 2, layers // 2, layers - 3


def config_for(target: Any, draft_vocabulary: int) -> dict[str, Any]:
    """The configuration of a head for a model with this configuration."""
    head_dim = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": target.rms_norm_eps,
        "rope_theta": 10000.0,
        "max_position_embeddings": target.max_position_embeddings,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocabulary,
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


@torch.no_grad()
def write_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, tokens: int, seconds: float
) -> list[tuple[list[int], int]]:
    """Texts of the model: the tokens, and the length of the prompt."""
    chance, texts, end = random.Random(0), list[tuple[list[int], int]](), time.monotonic() + seconds
    source = asks(chance)
    while time.monotonic() < end:
        prompts = []
        while len(prompts) < batch:
            chat = [{"role": "user", "content": next(source)}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            if len(ids) <= PROMPT:
                prompts.append(list(ids))
        width = max(map(len, prompts))
        rows = [[0] * (width - len(ids)) + ids for ids in prompts]
        seen = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        padded = {
            "input_ids": torch.tensor(rows, device=model.device),
            "attention_mask": torch.tensor(seen, device=model.device),
        }
        sampled = chance.random() < SAMPLED
        settings: dict[str, Any] = {"do_sample": True, "temperature": 0.8} if sampled else {"do_sample": False}
        out = model.generate(**padded, max_new_tokens=tokens, pad_token_id=0, **settings)[:, width:].tolist()
        for prompt, written in zip(prompts, out, strict=True):
            stop = next((i for i, token in enumerate(written) if token == tokenizer.eos_token_id), len(written) - 1)
            texts.append((prompt + written[: stop + 1], len(prompt)))
        print(f"{len(texts)} texts, {sum(len(text) for text, _ in texts)} tokens", flush=True)
    return texts


@torch.no_grad()
def prepare(model: PreTrainedModel, texts: list[tuple[list[int], int]], rows: int) -> list[Batch]:
    """Batches of texts of similar length, with the model's features: the last texts, as many as KEPT_GIB hold."""
    model_bytes = 4 * model.config.hidden_size * model.dtype.itemsize
    room, kept = KEPT_GIB * 2**30 // model_bytes, list[tuple[list[int], int]]()
    for text in reversed(texts):
        room -= len(text[0])
        if room < 0:
            break
        kept.append(text)
    kept.sort(key=lambda text: len(text[0]))
    return [batch_of(model, kept[first : first + rows]) for first in range(0, len(kept), rows)]


def batch_of(model: PreTrainedModel, texts: list[tuple[list[int], int]]) -> Batch:
    """The batch of these texts."""
    length = max(len(text) for text, _ in texts)
    tokens, written = (torch.zeros(len(texts), length, dtype=kind) for kind in (torch.int64, torch.bool))
    for row, (text, prompt) in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
        written[row, prompt : len(text)] = True
    tokens = tokens.to(model.device)
    states = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    taken = torch.cat([states[tap] for tap in taps_of(model.config.num_hidden_layers)], -1)
    return Batch(tokens, written.to(model.device), taken, states[-1])


@torch.no_grad()
def begin(head: Eagle3, model: PreTrainedModel, targets: Tensor) -> None:
    """Copy the parts of the model to the head that the head's own continue: see Plan."""
    head.lm_head.weight.copy_(model.lm_head.weight[targets])
    head.norm.weight.copy_(model.model.norm.weight)
    layer, last = head.midlayer, model.model.layers[-1]
    layer["post_attention_layernorm"].weight.copy_(last.post_attention_layernorm.weight)
    for name, linear in layer["mlp"].items():
        weight = getattr(last.mlp, name).weight
        linear.weight[: weight.shape[0], : weight.shape[1]] = weight
    hidden = head.fc.weight.shape[0]
    head.fc.weight.mul_(0.1)[:, -hidden:] += torch.eye(hidden, device=targets.device)


def train(
    model: PreTrainedModel, head: Eagle3, targets: Tensor, data: list[Batch], seconds: float, plan: Plan
) -> list[float]:
    """Train the head for so long; the shares of right proposals by place, in batches that it has not seen."""
    device, begun, chance = targets.device, time.monotonic(), random.Random(1)
    if plan.copied:
        begin(head, model, targets)
    optimizer = torch.optim.AdamW(head.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
    held, data, step, order = data[::HELD_OUT], [batch for i, batch in enumerate(data) if i % HELD_OUT], 0, list[int]()
    own = torch.full((model.config.vocab_size,), -1, dtype=torch.int64, device=device)
    own[targets] = torch.arange(len(targets), device=device)
    vocabulary = own, model.lm_head.weight[targets]
    while (passed := (time.monotonic() - begun) / seconds) < 1:
        rate = plan.rate * min(1.0, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * passed))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if not order:
            order = chance.sample(range(len(data)), len(data))
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = unrolled(head, data[order.pop()], vocabulary, plan.steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step} loss {float(loss.detach()):.3f} at {passed:.2f}", flush=True)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        shares = torch.stack([unrolled(head, batch, vocabulary, plan.steps)[1] for batch in held]).mean(0).tolist()
    print(f"{step} steps over {len(data)} batches", flush=True)
    return [float(share) for share in shares]


def unrolled(head: Eagle3, batch: Batch, vocabulary: tuple[Tensor, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """The loss over steps of the head's own features, and the share of right proposals of each.

    vocabulary  the head's number of each token, or -1; and the rows of the model's head for the head's tokens
    """
    own, rows = vocabulary
    tokens, count = batch.tokens, batch.tokens.shape[1]
    with torch.no_grad():
        wanted = (batch.last @ rows.T).softmax(-1, dtype=torch.float32).to(batch.last.dtype)
    features, earlier = head.fc(batch.taken), list[tuple[Tensor, Tensor]]()
    loss, found = torch.zeros((), device=tokens.device), list[Tensor]()
    for step in range(steps):
        features = head(tokens.roll(-1 - step, 1), features, earlier)
        # row t proposes token t + 2 + step: what the model chooses behind position t + 1 + step
        kept = count - 2 - step
        valid = batch.written[:, 2 + step :].nonzero(as_tuple=True)
        logits = head.logits(features[:, :kept][valid]).float()
        each = functional.cross_entropy(logits, wanted[:, 1 + step : -1][valid].float())
        loss = loss + DECAY**step * each
        chosen = own[tokens[:, 2 + step :][valid]]
        found.append((logits.argmax(-1) == chosen).float().mean())
    return loss, torch.stack(found).detach()


def frequent(texts: list[tuple[list[int], int]], vocabulary: int, count: int) -> Tensor:
    """The tokens that were written most, in order."""
    counted = torch.bincount(
        torch.tensor([token for text, prompt in texts for token in text[prompt:]]), minlength=vocabulary
    )
    return counted.topk(count).indices.sort().values


def main() -> None:
    """Writes texts, then trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--draft-vocabulary", type=int, default=16384)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    directory, device, begun = model_directory(arguments.model), torch.device(arguments.device), time.monotonic()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    seconds = 60 * arguments.minutes
    texts = write_texts(model, tokenizer, arguments.batch, arguments.tokens, WRITING * seconds)
    targets = frequent(texts, model.config.vocab_size, arguments.draft_vocabulary)
    config = config_for(model.config, arguments.draft_vocabulary)
    head = Eagle3(config, model.get_input_embeddings().weight.detach().float()).to(device)
    data = prepare(model, texts, arguments.rows)
    right = train(model, head, targets.to(device), data, seconds - (time.monotonic() - begun), Plan())
    write_head(head, config, targets, arguments.out)
    row = {"texts": len(texts), "written": sum(len(text) - prompt for text, prompt in texts)}
    row |= {"right": [round(share, 3) for share in right]}
    row |= {"minutes": round((time.monotonic() - begun) / 60, 2), "argv": sys.argv[1:]}
    (arguments.out / "training.json").write_text(json.dumps(row))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
