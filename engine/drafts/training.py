"""EAGLE-3 heads in plain torch, and their training on texts that the model itself wrote.

A text is read once by the engine, whose features and likeliest tokens are kept. The head is unrolled over its own
features, as in drafting, and learns the model's distribution behind every token that the model wrote.

Source: Li et al., EAGLE-3 (2025).
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.eagle import LAYERS, eagle_names
from lowbit.engine.drafts.gauge import as_wide_as_may_be
from lowbit.engine.drafts.kinds import kind_of
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.sampling import Sampling
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import Checkpoint
from lowbit.export.formats import LogicalTensors

DECAY = 0.9  # of the loss, a step of the head's own features
WARM = 0.03  # share of a training until the learning rate is whole
LIKELIEST = 32  # tokens of a distribution that is learned
HELD_OUT = 20  # of so many lessons, one is not learned
BATCH = 64  # texts that are written at a time
THETA = 10000.0  # of a rope that names none
BETAS, DECAYED, CLIPPED = (0.9, 0.95), 0.01, 1.0


@dataclass(frozen=True)
class Plan:
    """Settings of a training.

    seconds  after which it ends
    rate     highest learning rate
    steps    of the head's own features
    most     steps of the optimizer after which it ends
    """

    seconds: float
    rate: float = 2e-3
    steps: int = 5
    most: int = 1 << 30


@dataclass(frozen=True)
class Text:
    """Tokens of which the model wrote those from `prompt` on."""

    tokens: Sequence[int]
    prompt: int


@dataclass(frozen=True)
class Lesson:
    """Texts of similar length, padded.

    tokens   (B, T)
    written  (B, T) bool  the model wrote this token
    taken    (B, T, taps * hidden)  features of the model
    likely   (B, T, n)  the head's numbers of the likeliest tokens behind each position
    chances  (B, T, n)  the probabilities of these, of 1 together
    best     (B, T)  the head's number of the likeliest token, or -1 if the head does not know it
    """

    tokens: Tensor
    written: Tensor
    taken: Tensor
    likely: Tensor
    chances: Tensor
    best: Tensor


class Eagle3(nn.Module):
    """The head in plain torch, its tensors named as in published files.

    config  of the head, as in published files
    """

    def __init__(self, config: Mapping[str, Any], embedding: Tensor) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or hidden // self.heads
        self.eps, self.theta = config["rms_norm_eps"], config["rope_theta"]
        self.normed = bool(config.get("norm_before_residual", False))
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
        self.fc = linear(3 * (config.get("target_hidden_size") or hidden), hidden)
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
        layer, step = self.midlayer.get_submodule, len(earlier)
        embedded = functional.embedding(tokens, self.embedding).to(features.dtype)
        seen = layer("hidden_norm")(features)
        x = torch.cat([layer("input_layernorm")(embedded), seen], -1)
        positions = torch.arange(tokens.shape[1], device=tokens.device) + step
        q, k, v = (layer(f"self_attn.{name}_proj")(x).unflatten(-1, (-1, self.head_dim)) for name in ("q", "k", "v"))
        q, k = self.turned(q, positions), self.turned(k, positions)
        earlier.append((k, v))
        h = (seen if self.normed else features) + layer("self_attn.o_proj")(self.attend(q, earlier).flatten(2))
        y = layer("post_attention_layernorm")(h)
        gated = functional.silu(layer("mlp.gate_proj")(y)) * layer("mlp.up_proj")(y)
        return h + layer("mlp.down_proj")(gated)

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


def write_texts(model: Engine, prompts: Sequence[list[int]], tokens: int, warm: float = 0.0) -> list[Text]:
    """Texts of the model behind prompts. Every second one is sampled at temperature `warm`, the others are greedy."""
    options = replace(model.options, batch=BATCH)
    writer = Engine(model.decoder, None, options)
    settings = [Sampling(max_new_tokens=tokens, temperature=warm * (i % 2), seed=i) for i in range(len(prompts))]
    written = writer.generate(prompts, settings)
    return [
        Text([*prompt, *each.tokens], len(prompt)) for prompt, each in zip(prompts, written, strict=True) if each.tokens
    ]


def reason_against(drafter: Checkpoint) -> str | None:
    """The reason why a drafter cannot be trained, or None."""
    config = drafter.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind_of(drafter).mark != "Eagle3":
        return "it is no EAGLE-3 head"
    if LogicalTensors(drafter).schemes:
        return "its linears are quantized: give the head from which it was made"
    if rope.get("rope_type", "default") != "default":
        return f"its rope is {rope['rope_type']!r}; 'default' is trained"
    return None


def open_head(drafter: Checkpoint, embedding: Tensor) -> Eagle3:
    """The head of a drafter in float32, on the device of the embeddings (vocabulary, hidden). CheckpointError for what
    is not trained, and for tensors of another kind."""
    if reason := reason_against(drafter):
        raise CheckpointError(f"{drafter.head}: {reason}")
    config, tensors = dict(drafter.config), LogicalTensors(drafter)
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", THETA))
    config.setdefault("draft_vocab_size", config["vocab_size"])
    head = Eagle3(config, embedding)
    found = {own: tensors.read(name).float() for name, own in names_of(drafter).items()}
    try:
        head.load_state_dict(found)
    except RuntimeError as error:
        raise CheckpointError(f"{drafter.head}: {str(error).splitlines()[-1].strip()}") from error
    return head.to(embedding.device)


def names_of(drafter: Checkpoint) -> dict[str, str]:
    """The names of an Eagle3's parameters, by those in a drafter's files."""
    layer, learned = eagle_names(drafter.entries).layer, ("fc.", "norm.", "lm_head.")
    return {
        name: name.replace(layer, LAYERS[0])
        for name in drafter.entries
        if name.startswith((layer, *learned)) and not name.endswith("embed_tokens.weight")
    }


def trained(drafter: Checkpoint, head: Eagle3) -> dict[str, Tensor]:
    """The tensors of a drafter's files with the parameters of `head`, each in the dtype that it had."""
    state, own = head.state_dict(), names_of(drafter)
    found = {name: drafter.read(name) for name in drafter.entries}
    return found | {name: state[own[name]].to(found[name].dtype).cpu().contiguous() for name in own}


def acceptance(model: Engine, prompts: Sequence[list[int]], tokens: int) -> tuple[float, list[float]]:
    """Tokens a step of greedy texts with drafts, one at a time, and the shares of right drafts by place."""
    model.spaces.costs = as_wide_as_may_be()
    found = [model.generate([prompt], max_new_tokens=tokens, ignore_eos=True)[0] for prompt in prompts]
    places = zip_longest(*(each.drafts for each in found), fillvalue=(0, 0))
    right = [sum(r for _, r in place) / max(sum(c for c, _ in place), 1) for place in places]
    return sum(len(each.tokens) for each in found) / sum(each.steps for each in found), right


class Teacher:
    """Reads texts for a head.

    taps     layers of the model whose outputs make a feature
    targets  (n) int64: the model's token for each of the head's
    """

    def __init__(self, model: Engine, taps: tuple[int, ...], targets: Tensor) -> None:
        decoder, context = model.decoder, model.options.context
        tapped = Decoder(decoder.architecture, decoder.weights, decoder.context, taps)
        self.engine, self.targets = Engine(tapped, None, Options(context)), targets
        self.own = torch.full((decoder.architecture.vocabulary,), -1, dtype=torch.int64, device=targets.device)
        self.own[targets] = torch.arange(len(targets), device=targets.device)

    def lessons(self, texts: Sequence[Text], rows: int) -> list[Lesson]:
        """Lessons of so many texts each."""
        ordered = sorted(texts, key=lambda text: len(text.tokens))
        return [self.lesson(ordered[first : first + rows]) for first in range(0, len(ordered), rows)]

    @torch.no_grad()
    def lesson(self, texts: Sequence[Text]) -> Lesson:
        """The lesson of these texts."""
        parts = [self.read(text) for text in texts]
        length = max(len(text.tokens) for text in texts)
        written = torch.zeros(len(texts), length, dtype=torch.bool, device=self.targets.device)
        for row, text in enumerate(texts):
            written[row, text.prompt : len(text.tokens)] = True
        padded = [
            torch.stack([functional.pad(part, (0, 0) * (part.ndim - 1) + (0, length - len(part))) for part in each])
            for each in zip(*parts, strict=True)
        ]
        tokens, taken, likely, chances, best = padded
        return Lesson(tokens, written, taken, likely, chances, best)

    def read(self, text: Text) -> tuple[Tensor, ...]:
        """A text's tokens, features, likeliest tokens with their chances, and the likeliest of all."""
        with self.engine.spaces.lent() as space:
            reader = space.roomy_reader(1, len(text.tokens))
            logits = torch.cat([self.engine.decoder.logits(hidden) for hidden in reader.read(0, text.tokens)])
            features = reader.cache.features
            assert features is not None
            taken = features[: len(text.tokens)].clone()
        found = logits[:, self.targets].topk(min(LIKELIEST, len(self.targets)))
        chances, best = found.values.softmax(-1), self.own[logits.argmax(-1)]
        tokens = torch.tensor(text.tokens, device=self.targets.device)
        return tokens, taken, found.indices.to(torch.int32), chances.to(taken.dtype), best


def train(
    head: Eagle3, lessons: Sequence[Lesson], plan: Plan, tell: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train the head; the shares of right proposals by place, in lessons that it has not learned.

    tell  is called with the number of steps before each
    """
    begun, chance, order = time.monotonic(), random.Random(1), list[int]()
    held, learned = lessons[::HELD_OUT], [lesson for i, lesson in enumerate(lessons) if i % HELD_OUT]
    learned = learned or list(held)
    optimizer = torch.optim.AdamW(head.parameters(), lr=plan.rate, betas=BETAS, weight_decay=DECAYED)
    for step in range(plan.most):
        passed = max((time.monotonic() - begun) / plan.seconds, step / plan.most)
        if passed >= 1:
            break
        tell(step)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, passed / WARM) * 0.5 * (1 + math.cos(math.pi * passed))
        order = order or chance.sample(range(len(learned)), len(learned))
        loss, _ = unrolled(head, learned[order.pop()], plan.steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), CLIPPED)
        optimizer.step()
    return shares_of(head, held, plan.steps)


@torch.no_grad()
def shares_of(head: Eagle3, lessons: Sequence[Lesson], steps: int) -> list[float]:
    """The shares of right proposals by place."""
    found = torch.stack([unrolled(head, lesson, steps)[1] for lesson in lessons])
    shares: list[float] = found.mean(0).tolist()
    return shares


def unrolled(head: Eagle3, lesson: Lesson, steps: int) -> tuple[Tensor, Tensor]:
    """The loss over steps of the head's own features, and the share of right proposals of each."""
    device = lesson.tokens.device.type
    tokens, count = lesson.tokens, lesson.tokens.shape[1]
    loss, found = torch.zeros((), device=tokens.device), list[Tensor]()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        features, earlier = head.fc(lesson.taken.to(head.fc.weight.dtype)), list[tuple[Tensor, Tensor]]()
        for step in range(steps):
            features = head(tokens.roll(-1 - step, 1), features, earlier)
            # row t proposes token t + 2 + step: what the model chooses behind position t + 1 + step
            valid = lesson.written[:, 2 + step :].nonzero(as_tuple=True)
            logits = head.logits(features[:, : count - 2 - step][valid]).float()
            likely, chances, best = (
                part[:, 1 + step : -1][valid] for part in (lesson.likely, lesson.chances, lesson.best)
            )
            picked = (logits.gather(1, likely.long()) * chances.float()).sum(-1)
            loss = loss + DECAY**step * (logits.logsumexp(-1) - picked).mean()
            found.append((logits.argmax(-1) == best).float().mean())
    return loss, torch.stack(found).detach()
