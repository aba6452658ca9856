"""Drafts for the few jobs that write at a time: see engine/drafts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.engine.drafts.drafting import MOST_SEQUENCES, Drafting, Masks
from lowbit.engine.drafts.suffix import Suffixes
from lowbit.engine.sampler import BITS, Features
from lowbit.engine.sampling import Piece
from lowbit.engine.workspace import Workspace
from lowbit.serve.job import Constraint, Job


class Drafts:
    """Steps with at most `most` draft tokens for each job; 0 for none."""

    def __init__(self, space: Workspace, most: int) -> None:
        self.drafting = Drafting(space, Suffixes(), most) if most else None
        self.rest = 0  # steps without drafts to come

    def wanted(self, jobs: Sequence[Job]) -> bool:
        """True if the next step of these jobs has drafts."""
        if self.drafting is None or not 0 < len(jobs) <= MOST_SEQUENCES:
            return False
        if self.rest:
            self.rest -= 1
            return False
        return True

    def start(self, jobs: Sequence[Job], features: Features) -> None:
        """Write these jobs from now on."""
        assert self.drafting is not None
        sequences = [job.slot.sequence for job in jobs if job.slot is not None]
        self.drafting.start([job.request for job in jobs], sequences, features)

    def step(self, masks: Masks | None) -> list[Piece]:
        """Run one step; the piece of each job."""
        assert self.drafting is not None
        pieces = self.drafting.step(masks)
        self.rest = self.drafting.gauge.rest
        return pieces

    def reset(self) -> None:
        """Forget all texts."""
        if self.drafting is not None:
            self.drafting.given.clear()
        self.rest = 0


def fill_rows(grammar: Constraint, rows: Tensor, draft: Sequence[int]) -> int:
    """Write the masks of the rows that check a draft; the number of its tokens that the grammar allows. The last token
    of a text is left to the model's own choice.

    rows  (1 + len(draft) or more, words) int32
    """
    trial = grammar.copy()
    trial.fill(rows[0])
    for i, token in enumerate(draft):
        if not int(rows[i, token // BITS]) >> (token % BITS) & 1:
            return i
        trial.take(token)
        if trial.ended:
            return i
        trial.fill(rows[i + 1])
    return len(draft)


def unmasked(allowed: Tensor) -> Tensor:
    """Masks on the host that allow every token."""
    return torch.full(allowed.shape, -1, dtype=torch.int32, pin_memory=allowed.is_cuda)
