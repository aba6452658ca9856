"""EAGLE-3 heads in plain torch, and their training on texts that the model itself wrote.

The head is unrolled over its own features, as in drafting, and learns the model's distribution behind every token that
the model wrote.

Source: Li et al., EAGLE-3 (2025); Jordan et al., Muon (2024).
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.engine.drafts.eagle import LAYERS, eagle_names
from lowbit.engine.drafts.gauge import as_wide_as_may_be
from lowbit.engine.drafts.kinds import kind_of
from lowbit.engine.drafts.lessons import Lesson
from lowbit.engine.engine import Engine
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import Checkpoint
from lowbit.export.formats import LogicalTensors

DECAY = 0.9  # of the loss, a step of the head's own features
WARM = 0.03  # share of a training until the learning rate is whole
HELD_OUT = 20  # of so many lessons, one is not learned
THETA = 10000.0  # of a rope that names none
BETAS, DECAYED, CLIPPED = (0.9, 0.95), 0.01, 1.0
HEADS_RATE = 0.5  # learning rate of the output head and of norms, of that of the layer


@dataclass(frozen=True)
class Plan:
    """Settings of a training.

    seconds  after which it ends
    rate     highest learning rate
    steps    of the head's own features
    most     steps of the optimizer after which it ends
    """

    seconds: float
    rate: float = 3e-3
    steps: int = 5
    most: int = 1 << 30


class Rms(nn.RMSNorm):
    """A norm that computes in its input's dtype, for which torch has one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden), normed."""
        assert self.weight is not None
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


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
        norms = {name: Rms(hidden, self.eps) for name in ("hidden_norm", "input_layernorm")}
        norms["post_attention_layernorm"] = Rms(hidden, self.eps)
        self.midlayer = nn.ModuleDict({"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp), **norms})
        self.fc = linear(3 * (config.get("target_hidden_size") or hidden), hidden)
        self.norm = Rms(hidden, self.eps)
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
        count, groups = q.shape[1], self.heads // self.kv_heads
        k, v = (
            torch.cat(parts, 1).repeat_interleave(groups, 2).transpose(1, 2) for parts in zip(*earlier, strict=True)
        )
        seen = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
        own = torch.eye(count, dtype=torch.bool, device=q.device).repeat(1, len(earlier) - 1)
        mask = torch.cat([seen, own], 1)
        return functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)

    def logits(self, features: Tensor) -> Tensor:
        """The logits (B, T, draft vocabulary) behind features."""
        return self.lm_head(self.norm(features))


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


def train(
    head: Eagle3, lessons: Sequence[Lesson], plan: Plan, tell: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train the head; the shares of right proposals by place, in lessons that it has not learned.

    tell  is called with the number of steps before each
    """
    begun, chance, order = time.monotonic(), random.Random(1), list[int]()
    held, learned = lessons[::HELD_OUT], [lesson for i, lesson in enumerate(lessons) if i % HELD_OUT]
    learned = learned or list(held)
    optimizers = optimizers_of(head)
    for step in range(plan.most):
        passed = max((time.monotonic() - begun) / plan.seconds, step / plan.most)
        if passed >= 1:
            break
        tell(step)
        rate = plan.rate * min(1.0, passed / WARM) * 0.5 * (1 + math.cos(math.pi * passed))
        order = order or chance.sample(range(len(learned)), len(learned))
        loss, _ = unrolled(head, learned[order.pop()], plan.steps)
        head.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), CLIPPED)
        for optimizer, share in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
    return shares_of(head, held, plan.steps)


def optimizers_of(head: Eagle3) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers of a head's parameters, each with its share of the learning rate: Muon for the matrices of the
    layer, AdamW for norms and the output head. Of the demo model's first drafts 68% were right after 28 s on a shared
    H200, and 48% after 22 s with AdamW for all."""
    matrices, others = list[Tensor](), list[Tensor]()
    for name, parameter in head.named_parameters():
        (matrices if parameter.ndim == 2 and not name.startswith("lm_head.") else others).append(parameter)
    muon = torch.optim.Muon(matrices, weight_decay=DECAYED, adjust_lr_fn="match_rms_adamw")
    return [(muon, 1.0), (torch.optim.AdamW(others, betas=BETAS, weight_decay=DECAYED), HEADS_RATE)]


@torch.no_grad()
def shares_of(head: Eagle3, lessons: Sequence[Lesson], steps: int) -> list[float]:
    """The shares of right proposals by place."""
    found = torch.stack([unrolled(head, lesson, steps)[1] for lesson in lessons])
    shares: list[float] = found.mean(0).tolist()
    return shares


def unrolled(head: Eagle3, lesson: Lesson, steps: int) -> tuple[Tensor, Tensor]:
    """The loss over steps of the head's own features, and the share of right proposals of each."""
    device, tokens, likely = lesson.tokens.device, lesson.tokens, lesson.likely.long()
    loss, found = torch.zeros((), device=device), list[Tensor]()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        features, earlier = head.fc(lesson.taken.to(head.fc.weight.dtype)), list[tuple[Tensor, Tensor]]()
        for step in range(steps):
            features = head(tokens.roll(-1 - step, 1), features, earlier)
            # row t has token t + 1 + step, and proposes what the model chooses behind it
            logits = head.logits(features.flatten(0, 1)[lesson.rows - 1 - step]).float()
            picked = (logits.gather(1, likely) * lesson.chances).sum(-1)
            loss = loss + DECAY**step * (logits.logsumexp(-1) - picked).mean()
            found.append((logits.argmax(-1) == lesson.best).float().mean())
    return loss, torch.stack(found).detach()
