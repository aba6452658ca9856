"""Windows of a text for scoring, and the protocol that cuts them: part of every number."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.calibrate.data import leading_bos
from lowbit.errors import CheckpointError, UsageError
from lowbit.models.source import Source

BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 27  # elements of a batch's logits: 512 MiB in float32


@dataclass(frozen=True)
class Protocol:
    """The way from a text to scores.

    context  tokens per window
    stride   None: windows without overlap, each scored from its second token, with the rest of the text dropped (what
             GPTQ and most papers report). Otherwise windows start `stride` tokens apart, and each scores only tokens
             that the one before did not reach: every token but the first is scored once.
    windows  number of windows from the start of the text; None for all
    bos      True: every window starts with the tokenizer's BOS, as in calibration, and all its other tokens may be
             scored. False: only the first window has the BOS that the tokenizer puts before the text
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
        """The protocol in words, without the context; `dtype` is the dtype of the computation."""
        begun = ", BOS before every window" if self.bos else ""
        if self.stride is None:
            return f"non-overlapping windows{begun}, {dtype}, first token of a window not scored"
        apart = f"windows {self.stride} tokens apart{begun}, {dtype}"
        return f"{apart}, each token scored once, in the first window that holds it"


@dataclass(frozen=True)
class Cut:
    """The windows of a text for one tokenizer.

    windows   token ids (T,) int64 of each; T is the context, shorter in the last strided one
    first     position of the first scored token in each window, at least 1
    begun     True if only the first window starts with a BOS that the tokenizer puts before every text
    """

    protocol: Protocol
    windows: tuple[Tensor, ...]
    first: tuple[int, ...]
    text_sha256: str
    begun: bool = False

    def describe(self, dtype: str) -> str:
        """The protocol in words, including the position of BOS."""
        return self.protocol.describe(dtype) + (", BOS before the first window alone" if self.begun else "")

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(len(ids) - first for ids, first in zip(self.windows, self.first, strict=True))

    @property
    def ids_sha256(self) -> str:
        """SHA-256 of all windows' ids and first scored positions."""
        digest = hashlib.sha256()
        for ids, first in zip(self.windows, self.first, strict=True):
            digest.update(first.to_bytes(8, "little") + ids.numpy().tobytes())
        return digest.hexdigest()

    def batches(self, vocabulary: int, skipped: frozenset[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Indices and ids (B, T) of windows of equal length, without those in `skipped`."""
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
    """`text` tokenized once by the model's tokenizer (with its BOS, if any), and cut by `protocol`.

    UsageError if there is not a single window, or no BOS for a protocol that needs it.
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
    """Begin, end and first scored position of every window over `length` tokens, with `before` tokens prepended to
    each."""
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
    """Raise CheckpointError if two models tokenize the text differently: their losses are not comparable."""
    if cut_here.ids_sha256 != cut_there.ids_sha256:
        raise CheckpointError(
            f"{ours.name} and {other.name} cut the text into different tokens (vocabularies of "
            f"{ours.vocabulary} and {other.vocabulary}): their losses cannot be compared; "
            "name the model that the checkpoint was made from"
        )
