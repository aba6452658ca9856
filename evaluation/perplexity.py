"""Perplexity: the protocol everybody compares, said beside the number.

The text is tokenized once as the tokenizer does it (a BOS where it adds one), cut into non-overlapping windows, and
each window is scored on its own: the mean negative log-likelihood of every token but a window's first, in float32. A
model runs block by block, so one that fits no memory whole is scored too.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.errors import CheckpointError
from models.skeleton import open_skeleton
from models.source import Source
from models.walk import Walk

PROTOCOL = "non-overlapping windows, float32, first token of a window not scored"
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Score:
    """A model's loss on a text.

    window_nll  (windows,) float64  mean negative log-likelihood per token of each window, in nats
    context     tokens in a window; context - 1 of them are scored
    text_sha256  of the text's UTF-8 bytes
    ids_sha256   of the token ids scored
    """

    model: str
    window_nll: Tensor
    context: int
    text_sha256: str
    ids_sha256: str

    @property
    def nll(self) -> float:
        return float(self.window_nll.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return len(self.window_nll) * (self.context - 1)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "perplexity": round(self.perplexity, 4),
            "nll": round(self.nll, 6),
            "tokens": self.tokens,
            "windows": len(self.window_nll),
            "context": self.context,
            "protocol": PROTOCOL,
            "text_sha256": self.text_sha256,
        }


def difference(score: Score, baseline: Score) -> tuple[float, float | None]:
    """Mean paired difference of the windows' losses in nats, and its standard error; None for a single window."""
    delta = score.window_nll - baseline.window_nll
    error = float(delta.std() / math.sqrt(len(delta))) if len(delta) > 1 else None
    return float(delta.mean()), error


def describe_difference(baseline: Score, score: Score) -> str:
    """`+0.00404 ± 0.00298`: the paired difference as text."""
    delta, error = difference(score, baseline)
    return f"{delta:+.5f}" if error is None else f"{delta:+.5f} ± {error:.5f}"


def windows_of(text: str, source: Source, context: int, count: int | None) -> Tensor:
    """The first `count` windows (windows, context) of `text`, or all. CheckpointError where there is not one."""
    ids = torch.tensor(source.tokenizer()(text, verbose=False).input_ids, dtype=torch.int64)
    available = len(ids) // context
    if available < 1:
        raise CheckpointError(
            f"the text has {len(ids)} tokens, shorter than one window of {context}; pass a smaller --context"
        )
    return ids[: min(count or available, available) * context].view(-1, context)


@torch.no_grad()
def perplexity(
    source: Source,
    text: str,
    context: int = 512,
    windows: int | None = None,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """The score of a model on `text`.

    windows  how many to score, from the start of the text; None for all
    on_step  called with blocks done and blocks in all
    """
    ids = windows_of(text, source, context, windows)
    batches = list(ids.split(max(BATCH_TOKENS // context, 1)))
    walk = Walk(open_skeleton(source), device, torch.float32)
    hidden = walk.start(batches)
    total = len(walk.skeleton.blocks)
    for index in range(total):
        with walk.loaded(index):
            hidden = [walk.run(index, states) for states in hidden]
        on_step(index + 1, total)
    # one window at a time: the logits of a large vocabulary are the biggest tensor of all
    single = list(ids.split(1))
    losses = [
        _loss(logits[0], row[0].to(device))
        for row, logits in zip(single, walk.logits(single, _rows(hidden)), strict=True)
    ]
    return Score(source.name, torch.stack(losses), context, _sha256(text.encode()), _sha256(ids.numpy().tobytes()))


def _rows(hidden: list[Tensor]) -> list[Tensor]:
    return [row for batch in hidden for row in batch.split(1)]


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean loss, float64 scalar, of logits (T, vocabulary) for ids (T,)."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:]).double().cpu()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
