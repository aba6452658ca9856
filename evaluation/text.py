"""A text cut into windows that models are scored on: the protocol is part of every number."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.calibrate.data import leading_bos
from lowbit.errors import CheckpointError, UsageError
from lowbit.models.source import Source

BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 27  # logits of one batch: 512 MiB in float32


@dataclass(frozen=True)
class Protocol:
    """How a text becomes scores.

    context  tokens that the model sees at once
    stride   None: windows that do not overlap, each scored from its second token on, the rest of the text left out
             (what GPTQ and most papers report). Else windows begin `stride` tokens apart and each scores only what the
             one before did not reach, so that every token but the text's first is scored once.
    windows  at most so many, from the start of the text; None for all
    bos      every window begins with the tokenizer's BOS, as calibration's do, and all else in it may be scored; else
             only the first window has the one that the tokenizer puts before the text
    """

    context: int = 512
    stride: int | None = None
    windows: int | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        if self.context < 2:
            raise UsageError(f"a context of {self.context} tokens: at least 2 are needed, one to predict")
        if self.stride is not None and not 1 <= self.stride < self.context:
            raise UsageError(f"a stride of {self.stride} tokens: between 1 and {self.context - 1}, the context's")

        if self.windows is not None and self.windows < 1:
            raise UsageError(f"{self.windows} windows: at least 1 is needed")

    @property
    def name(self) -> str:
        return "gptq" if self.stride is None else "strided"

    def describe(self, dtype: str = "float32") -> str:
        """What a reader needs to repeat the number, context aside; `dtype` is what the model computed in."""
        begun = ", BOS before every window" if self.bos else ""
        if self.stride is None:
            return f"non-overlapping windows{begun}, {dtype}, first token of a window not scored"
        apart = f"windows {self.stride} tokens apart{begun}, {dtype}"
        return f"{apart}, each token scored once, in the first window that holds it"


@dataclass(frozen=True)
class Cut:
    """The windows of a text for one tokenizer.

    windows   token ids (T,) int64 of each; T is the context, shorter in the last strided one
    first     for each window, the position of the first token scored: 1 or more
    begun     whether only the first window begins with a BOS that the tokenizer puts before every text
    """

    protocol: Protocol
    windows: tuple[Tensor, ...]
    first: tuple[int, ...]
    text_sha256: str
    begun: bool = False

    def describe(self, dtype: str) -> str:
        """The protocol in words, and where BOS stands."""
        return self.protocol.describe(dtype) + (", BOS before the first window alone" if self.begun else "")

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(len(ids) - first for ids, first in zip(self.windows, self.first, strict=True))

    @property
    def ids_sha256(self) -> str:
        """Of all windows' ids, one after the other, with their first scored positions."""
        digest = hashlib.sha256()
        for ids, first in zip(self.windows, self.first, strict=True):
            digest.update(first.to_bytes(8, "little") + ids.numpy().tobytes())
        return digest.hexdigest()

    def batches(self, vocabulary: int, skipped: frozenset[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Indices of windows and their ids (B, T): windows of one length together, those in `skipped` left out."""
        most = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary)
        taken: list[int] = []
        for index, ids in enumerate(self.windows):
            if index in skipped:
                continue
            full = (len(taken) + 1) * len(ids) > most
            if taken and (full or len(ids) != len(self.windows[taken[0]])):
                yield taken, torch.stack([self.windows[i] for i in taken])
                taken = []
            taken.append(index)
        if taken:
            yield taken, torch.stack([self.windows[i] for i in taken])


def cut(text: str, source: Source, protocol: Protocol) -> Cut:
    """`text` tokenized once as the model's tokenizer does it (a BOS where it adds one), and cut by `protocol`.

    UsageError where there is not one window, or no BOS where the protocol wants one before each.
    """
    tokenizer = source.tokenizer()
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
    source.require_known(ids)
    bos = leading_bos(tokenizer)
    if protocol.bos and not len(bos):
        raise UsageError(f"{source.name}: its tokenizer puts no BOS before a text, so there is none for every window")
    context = protocol.context
    if context > (source.positions or context):
        raise UsageError(
            f"windows of {context} tokens, but {source.name} has positions for {source.positions}: pass a shorter "
            "--context"
        )
    if len(ids) < (context if protocol.stride is None else 2):
        raise UsageError(
            f"the text has {len(ids)} tokens, shorter than one window of {context}; pass a smaller --context"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    before = bos if protocol.bos else bos[:0]
    rest = ids[len(before) :]
    spans = _spans(len(rest), len(before), protocol)[: protocol.windows]
    windows = tuple(torch.cat([before, rest[begin:end]]) for begin, end, _ in spans)
    return Cut(protocol, windows, tuple(first for _, _, first in spans), digest, len(bos) > len(before))


def _spans(length: int, before: int, protocol: Protocol) -> list[tuple[int, int, int]]:
    """Begin and end of every window over `length` tokens, and its first scored position behind `before` others."""
    size = protocol.context - before
    if protocol.stride is None:
        return [(begin, begin + size, 1) for begin in range(0, length - size + 1, size)]
    spans, reached = [], 1 - before
    for begin in range(0, length, protocol.stride):
        end = min(begin + size, length)
        spans.append((begin, end, reached - begin + before))
        reached = end
        if end == length:
            break
    return spans


def require_same_tokens(ours: Source, other: Source, cut_here: Cut, cut_there: Cut) -> None:
    """Raise CheckpointError where two models cut the text into different tokens: their losses mean different things."""
    if cut_here.ids_sha256 != cut_there.ids_sha256:
        raise CheckpointError(
            f"{ours.name} and {other.name} cut the text into different tokens (vocabularies of "
            f"{ours.vocabulary} and {other.vocabulary}): their losses cannot be compared; "
            "name the model that the checkpoint was made from"
        )
