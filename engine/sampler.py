"""Sampling: from logits to tokens, for a batch of requests with different settings, on the logits' device.

Nothing depends on values known only to the device, so a graph can capture it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.sampling import LONGEST_BAD_WORD, MOST_LOGPROBS, Sampling
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.choose_tokens import ChoiceCall, Cursor, Mailbox, Noise

BITS = 32  # tokens per word of a mask


@dataclass(frozen=True)
class Features:
    """Features that a batch needs beyond greedy decoding. Batches with equal features can share a captured graph."""

    sampled: bool = False
    truncated: bool = False
    penalized: bool = False
    bad_words: int = 0  # rounded up to a power of two
    logprobs: bool = False  # of MOST_LOGPROBS alternatives: requests for fewer use the first ones
    masked: bool = False  # by Sampler.allowed, which the caller sets before each choice

    @property
    def fused(self) -> bool:
        """True if one kernel chooses from the logits as they are."""
        truncated = self.sampled and self.truncated
        return not (truncated or self.penalized or self.bad_words or self.logprobs or self.masked)


@dataclass(frozen=True)
class Constraints:
    """A request's sampling with its words as tokens: stop tokens (also the model's own) and bad words.

    written  tokens generated so far
    """

    sampling: Sampling
    seed: int
    prompt: Sequence[int]
    stop_tokens: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...] = ()
    written: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """tokens (B) int64; logprobs (B, 1 + n) float32 of the token and the n likeliest ones, top (B, n), if requested."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top: Tensor | None = None


def features_of(requests: Sequence[Constraints]) -> Features:
    """The features that the batch needs."""
    settings = [request.sampling for request in requests]
    words = max((len(request.bad_words) for request in requests), default=0)
    return Features(
        sampled=any(each.temperature > 0 for each in settings),
        truncated=any(each.truncated for each in settings),
        penalized=any(each.penalized for each in settings),
        bad_words=1 << (words - 1).bit_length() if words else 0,
        logprobs=any(each.logprobs is not None for each in settings),
    )


class Sampler:
    """The tensors of `batch` requests with `features`. `start` fills them; a call chooses and records tokens."""

    def __init__(self, features: Features, batch: int, vocabulary: int, device: torch.device) -> None:
        self.features, self.vocabulary = features, vocabulary
        self.started = 0  # calls of `start`

        def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        self.temperature, self.top_p, self.min_p = tensor(1), tensor(1), tensor(1)
        self.top_k, self.seed, self.written = (tensor(1, dtype=torch.int64) for _ in range(3))
        # one bit per token, -1 for all of a row's tokens
        self.allowed = tensor(-(-vocabulary // BITS), dtype=torch.int32).fill_(-1)
        if features.penalized:
            self.repetition, self.presence, self.frequency = tensor(1), tensor(1), tensor(1)
            self.minimum = tensor(1, dtype=torch.int64)
            self.seen, self.stops = (tensor(vocabulary, dtype=torch.bool) for _ in range(2))
            self.counts, self.bias = tensor(vocabulary), tensor(vocabulary)
            # bad words: all tokens but the last, right-aligned, -1 for padding; a last token of `vocabulary` matches
            # nothing
            self.before = tensor(features.bad_words, LONGEST_BAD_WORD - 1, dtype=torch.int64)
            self.last = tensor(features.bad_words, dtype=torch.int64)
            self.recent = tensor(LONGEST_BAD_WORD - 1, dtype=torch.int64)

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return [self.written, self.seen, self.counts, self.recent] if self.features.penalized else [self.written]

    def start(self, requests: Sequence[Constraints]) -> None:
        """Start these requests, each after the tokens it has so far."""
        settings = [request.sampling for request in requests]
        vocabulary = self.vocabulary
        self.started += 1

        def fill(into: Tensor, values: list[float] | list[int]) -> None:
            into.copy_(torch.tensor(values, dtype=into.dtype).unsqueeze(1))

        fill(self.temperature, [each.temperature for each in settings])
        fill(self.top_k, [min(each.top_k or vocabulary, vocabulary) for each in settings])
        fill(self.top_p, [each.top_p for each in settings])
        fill(self.min_p, [each.min_p for each in settings])
        fill(self.seed, [request.seed for request in requests])
        fill(self.written, [len(request.written) for request in requests])
        if self.features.penalized:
            fill(self.repetition, [each.repetition_penalty for each in settings])
            fill(self.presence, [each.presence_penalty for each in settings])
            fill(self.frequency, [each.frequency_penalty for each in settings])
            fill(self.minimum, [each.min_new_tokens for each in settings])
            self.bias.copy_(biases([each.bias for each in settings], vocabulary))
            self.counts.copy_(counts_of([request.written for request in requests], vocabulary))
            self.seen.copy_(marks([[*request.prompt, *request.written] for request in requests], vocabulary))
            self.stops.copy_(marks([request.stop_tokens for request in requests], vocabulary))
            self.start_words(requests)

    def start_words(self, requests: Sequence[Constraints]) -> None:
        """Set the requests' bad words, and the last tokens of their sequences."""
        room = LONGEST_BAD_WORD - 1
        before = torch.full(self.before.shape, -1, dtype=torch.int64)
        last = torch.full(self.last.shape, self.vocabulary, dtype=torch.int64)
        recent = torch.full(self.recent.shape, -2, dtype=torch.int64)
        for b, request in enumerate(requests):
            tail = [*request.prompt, *request.written][-room:]
            recent[b, room - len(tail) :] = torch.tensor(tail)
            for i, word in enumerate(request.bad_words):
                last[b, i] = word[-1]
                if len(word) > 1:
                    before[b, i, room - len(word) + 1 :] = torch.tensor(word[:-1])
        self.before.copy_(before)
        self.last.copy_(last)
        self.recent.copy_(recent)

    def __call__(
        self,
        logits: Tensor,
        tokens: Tensor | None = None,
        cursor: Cursor | None = None,
        mailbox: Mailbox | None = None,
    ) -> Chosen:
        """The next tokens for logits (B, vocabulary) float32.

        tokens   (B) int64 to write them to; None for a new tensor
        cursor   advances by one position
        mailbox  receives the tokens, too
        """
        scores = self.penalize(logits) if self.features.penalized else logits
        if self.features.masked:
            scores = self.mask(scores)
        if self.features.sampled and self.features.truncated:
            scores = self.truncate(scores)
        noise = Noise(self.temperature[:, 0], self.seed[:, 0]) if self.features.sampled else None
        if tokens is None:
            tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        ops.choose(ChoiceCall(scores, tokens, self.written[:, 0], cursor, noise, True, mailbox))
        self.remember(tokens)
        if not self.features.logprobs:
            return Chosen(tokens)
        logprobs = logits.log_softmax(-1)
        best, top = logprobs.topk(min(MOST_LOGPROBS, self.vocabulary))
        return Chosen(tokens, torch.cat([logprobs.gather(1, tokens.unsqueeze(1)), best], 1), top)

    def penalize(self, logits: Tensor) -> Tensor:
        """Logits after penalties and biases; -inf for bad words, and for stop tokens that are too early."""
        divided = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        scores = torch.where(self.seen, divided, logits)
        scores = scores - self.presence * (self.counts > 0) - self.frequency * self.counts + self.bias
        banned = self.stops & (self.written < self.minimum)
        if self.features.bad_words:
            matches = (self.before == self.recent.unsqueeze(1)) | (self.before < 0)
            last = torch.where(matches.all(-1), self.last, self.vocabulary)
            words = torch.zeros(len(last), self.vocabulary + 1, dtype=torch.bool, device=last.device)
            banned = banned | words.scatter(1, last, True)[:, : self.vocabulary]
        return scores.masked_fill(banned, float("-inf"))

    def mask(self, scores: Tensor) -> Tensor:
        """Scores with -inf for tokens that are not allowed."""
        bits = (self.allowed.unsqueeze(-1) >> torch.arange(BITS, dtype=torch.int32, device=scores.device)) & 1
        return scores.masked_fill(bits.flatten(1)[:, : self.vocabulary] == 0, float("-inf"))

    def truncate(self, scores: Tensor) -> Tensor:
        """Scores with -inf outside top-k, top-p and min-p. A row without a temperature stays unchanged."""
        warm = self.temperature > 0
        scaled = scores / torch.where(warm, self.temperature, 1.0)
        return scores.masked_fill(warm & (scaled < self.threshold(scaled)), float("-inf"))

    def threshold(self, scaled: Tensor) -> Tensor:
        """The least score (B, 1) that is left by top-k, then top-p, then min-p."""
        ordered = scaled.sort(-1, descending=True).values
        rank = torch.arange(self.vocabulary, device=scaled.device)
        mass = ordered.masked_fill(rank >= self.top_k, float("-inf")).softmax(-1)
        kept = (mass.cumsum(-1) - mass < self.top_p) & (mass >= self.min_p * mass[:, :1]) & (mass > 0)
        kept = kept | (rank == 0)
        return ordered.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)

    def remember(self, tokens: Tensor) -> None:
        """Record the chosen tokens for penalties and bad words."""
        if self.features.penalized:
            column = tokens.unsqueeze(1)
            self.seen.scatter_(1, column, True)
            self.counts.scatter_add_(1, column, torch.ones_like(column, dtype=self.counts.dtype))
            self.recent.copy_(torch.cat([self.recent[:, 1:], column], 1))

    def take(self, tokens: Tensor) -> None:
        """Record tokens (B, any number) that were chosen elsewhere; the vocabulary's size stands for none."""
        if not self.features.penalized:
            return
        counted = self.counts.new_zeros(len(tokens), self.vocabulary + 1)
        counted.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=counted.dtype))
        self.counts += counted[:, : self.vocabulary]
        self.seen |= counted[:, : self.vocabulary] > 0
        for column in tokens.split(1, 1):
            after = torch.cat([self.recent[:, 1:], column], 1)
            self.recent.copy_(torch.where(column < self.vocabulary, after, self.recent))

    def reorder(self, rows: Tensor, tokens: Tensor) -> None:
        """Replace the state of row b by that of row `rows[b]`, followed by `tokens[b]`, for beam search."""
        self.written += 1
        if self.features.penalized:
            for kept in (self.seen, self.counts, self.recent):
                kept.copy_(kept[rows])
        self.remember(tokens)


def counts_of(rows: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """(B, vocabulary) float32: number of occurrences of each token in each row."""
    found = [torch.bincount(torch.tensor(row, dtype=torch.int64), minlength=vocabulary) for row in rows]
    return torch.stack(found).float()


def biases(rows: Sequence[Sequence[tuple[int, float]]], vocabulary: int) -> Tensor:
    """(B, vocabulary) float32: the sum of each token's biases in each row."""
    found = torch.zeros(len(rows), vocabulary)
    for row, pairs in zip(found, rows, strict=True):
        for token, value in pairs:
            row[token] += value
    return found


def marks(rows: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """(B, vocabulary) bool: True for tokens that occur in a row."""
    found = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
    for row, tokens in zip(found, rows, strict=True):
        row[torch.tensor(sorted(set(tokens)), dtype=torch.int64)] = True
    return found
