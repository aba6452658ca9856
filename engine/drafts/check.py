"""The choice of tokens behind drafts, all of a step at once.

Row j of a sequence chooses as if its drafts 1 to j were written: with their penalties, and with the noise of that
place. The token is then the one that the model chooses without drafts, whatever was drafted. So a draft is right with
the probability that the model gives it, and a wrong one is replaced by a draw from the rest: rejection sampling for
drafts without a distribution of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.sampler import Chosen, Sampler
from lowbit.engine.sampling import LONGEST_BAD_WORD
from lowbit.quant.kernels.choose_tokens import Cursor, Mailbox

MOST_FRESH = 8  # tokens of a sequence that one step makes certain
SHARED = ("temperature", "top_k", "top_p", "min_p", "seed")
SHARED_PENALTIES = ("repetition", "presence", "frequency", "minimum", "stops", "bias", "before", "last")


class Check(Sampler):
    """Chooses for `width` adjacent rows of each sequence of `base`, whose state is that of the tokens that are certain.

    fresh  (sequences, MOST_FRESH) tokens that became certain since the last step; the vocabulary's size for none
    """

    def __init__(self, base: Sampler, width: int) -> None:
        self.base, self.width, self.started = base, width, 0
        sequences, device = len(base.written), base.written.device
        super().__init__(base.features, sequences * width, base.vocabulary, device)
        self.fresh = torch.full((sequences, MOST_FRESH), base.vocabulary, dtype=torch.int64, device=device)
        self.places = torch.arange(width, device=device)

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return [*super().state, *self.base.state, self.fresh]

    def adopt(self) -> None:
        """Take the settings of the requests that `base` was started with."""
        if self.started == self.base.started:
            return
        self.started = self.base.started
        names = SHARED + SHARED_PENALTIES if self.features.penalized else SHARED
        for name in names:
            getattr(self, name).copy_(getattr(self.base, name).repeat_interleave(self.width, 0))

    def place(self, written: Sequence[int], fresh: Sequence[Sequence[int]]) -> None:
        """Set the input of the next step: each sequence's number of tokens written, and those of them that are new."""
        self.adopt()
        if self.features.sampled or self.features.penalized:
            counted = torch.tensor(written).unsqueeze(1) + torch.arange(self.width)
            self.written.copy_(counted.view(-1, 1))
        if self.features.penalized:
            none = self.vocabulary
            self.fresh.copy_(torch.tensor([[*tokens, *[none] * (MOST_FRESH - len(tokens))] for tokens in fresh]))

    def __call__(
        self,
        logits: Tensor,
        tokens: Tensor | None = None,
        cursor: Cursor | None = None,
        mailbox: Mailbox | None = None,
    ) -> Chosen:
        """The tokens after each row: logits (rows, vocabulary) float32, the rows' tokens (rows). Nothing advances."""
        assert tokens is not None
        if self.features.penalized:
            self.base.take(self.fresh)
            self.suppose(tokens.view(-1, self.width)[:, 1:])
        return super().__call__(logits, mailbox=mailbox)

    def follow(self, chosen: Tensor, right: Tensor) -> None:
        """Set the input of the next step without the host: behind the right drafts and the token after them.

        chosen  (sequences, width) tokens of the last call
        right   (sequences) int64: each sequence's right drafts
        """
        column = right.unsqueeze(1)
        if self.features.sampled or self.features.penalized:
            self.written.view(chosen.shape).add_(column)  # the choice itself has counted one token
        if self.features.penalized:
            kept = torch.where(self.places <= column, chosen, self.vocabulary)
            self.fresh.copy_(functional.pad(kept, (0, MOST_FRESH - self.width), value=self.vocabulary))

    def suppose(self, drafts: Tensor) -> None:
        """Set each row's state to that of its sequence after the drafts (sequences, width - 1) up to the row."""
        base = self.base
        added = self.counts.new_zeros(len(drafts), self.width, self.vocabulary)
        added[:, 1:].scatter_(2, drafts.unsqueeze(2), 1.0)
        counted = added.cumsum(1)
        self.counts.copy_((base.counts.unsqueeze(1) + counted).flatten(0, 1))
        self.seen.copy_((base.seen.unsqueeze(1) | (counted > 0)).flatten(0, 1))
        ends = torch.cat([base.recent, drafts], 1)
        self.recent.copy_(ends.unfold(1, LONGEST_BAD_WORD - 1, 1).flatten(0, 1))
