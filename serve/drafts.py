"""Drafts for the few jobs that write at a time: see engine/drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.drafts.drafter import Drafter
from lowbit.engine.drafts.drafting import Drafting, Masks
from lowbit.engine.drafts.heads import MOST
from lowbit.engine.drafts.suffix import Store, Suffixes
from lowbit.engine.drafts.widths import MOST_SEQUENCES
from lowbit.engine.sampler import BITS, Features
from lowbit.engine.sampling import Piece
from lowbit.engine.workspace import Workspace
from lowbit.serve.job import Constraint, Job


@dataclass(frozen=True)
class Lookup:
    """Drafts from the text.

    most    draft tokens a step, while few requests write; 0 for none
    stored  tokens of earlier requests that are kept, whose texts are looked up too; 0 for none
    """

    most: int = 0
    stored: int = 0


NO_LOOKUP = Lookup()


class Drafts:
    """Steps with drafts of the engine's drafter, or with drafts from the text."""

    def __init__(self, space: Workspace, lookup: Lookup) -> None:
        self.space, self.most = space, lookup.most if lookup.most or space.pool.head is None else MOST
        self.store = Store(lookup.stored) if lookup.stored else None
        self.made: Drafting | None = None
        self.rest = 0  # steps without drafts to come

    @property
    def drafting(self) -> Drafting:
        """The steps, made with the first one: a drafter's cache is as large as the batch's."""
        if self.made is None:
            drafter: Drafter = Suffixes(store=self.store) if self.space.pool.head is None else self.space.drafter()
            self.made = Drafting(self.space, drafter, self.most)
        return self.made

    def wanted(self, jobs: Sequence[Job]) -> bool:
        """True if the next step of these jobs has drafts."""
        if not self.most or not 0 < len(jobs) <= MOST_SEQUENCES:
            return False
        if self.rest:
            self.rest -= 1
            same = [job.request for job in jobs] == self.drafting.requests
            return same and all(job.request.left for job in jobs) and self.drafting.wakes
        return True

    def start(self, jobs: Sequence[Job], features: Features) -> None:
        """Write these jobs from now on."""
        sequences = [job.slot.sequence for job in jobs if job.slot is not None]
        self.drafting.start([job.request for job in jobs], sequences, features)

    def step(self, masks: Masks | None) -> list[Piece]:
        """Run one step; the piece of each job."""
        pieces = self.drafting.step(masks)
        self.rest = self.drafting.gauge.rest
        return pieces

    def reset(self) -> None:
        """Forget all texts but the store's."""
        self.made, self.rest = None, 0


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
