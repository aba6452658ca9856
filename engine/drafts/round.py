"""Steps that check drafts and write the next ones, on a GPU as one captured graph.

A step's inputs are each sequence's last token and its drafts. The model chooses behind each of them, the right drafts
are counted, and the head reads the tokens that are certain now, and drafts behind them. So a step leaves the inputs of
the next one on the device, and the host, which only learns the tokens, may launch it before it knows them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.engine.drafts.check import Check
from lowbit.engine.drafts.heads import Heads
from lowbit.engine.passes import Reader
from lowbit.engine.runner import SENT, Runner, Written
from lowbit.engine.step import Step
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.choose_tokens import ChoiceCall, Mailbox


class Round(Runner):
    """Such steps for the sequences of a Check, whose rows are those of the runner.

    begins  (rows) int64  the slot of position 0 of each row's sequence in the cache of `heads`
    right   (sequences) int64  right drafts of the last step, which go to the host in `counts`
    """

    def __init__(self, reader: Reader, longest: int, check: Check, heads: Heads) -> None:
        self.check, self.heads = check, heads
        sequences, width = check.fresh.shape[0], check.width
        super().__init__(reader, sequences * width, longest, check, width)
        device = self.tokens.device
        self.begins = torch.zeros_like(self.tokens)
        self.wrong = torch.ones(sequences, width, device=device)
        self.right, self.choices = (torch.zeros(sequences, dtype=torch.int64, device=device) for _ in range(2))
        self.firsts = torch.arange(sequences, device=device) * width
        self.captures = self.captures and heads.captured
        self.counts: Mailbox | None = None
        if self.captures:
            sent = torch.zeros(SENT, sequences, dtype=torch.int64, pin_memory=True)
            self.counts = Mailbox(sent, torch.zeros_like(self.right))

    @property
    def state(self) -> list[Tensor]:
        """See Runner."""
        return super().state if self.counts is None else [*super().state, self.counts.turns]

    def place(self, tokens: Sequence[int], positions: Sequence[int], starts: Sequence[int]) -> None:
        """See Runner."""
        super().place(tokens, positions, starts)
        own = self.heads.cache.context
        self.begins.copy_(torch.tensor([start // self.cache.context * own for start in starts]))

    def compute(self) -> None:
        """See Runner. The next step's inputs take the place of this one's."""
        super().compute()
        assert self.result is not None
        assert self.cache.features is not None
        chosen, cache = self.result.tokens, self.heads.cache
        rows = self.tokens.view(-1, self.adjacent)
        self.count(rows, chosen.view_as(rows))
        last, taken = self.firsts + self.right, self.cache.features.index_select(0, self.slots)
        slots = self.begins + self.positions
        where = self.positions, self.positions, self.begins, slots
        pairs = Step(chosen, *where, longest=cache.context, adjacent=self.adjacent)
        drafts = self.heads.head.draft(taken, pairs, last, self.adjacent - 1, cache)
        self.check.follow(chosen.view_as(rows), self.right)
        rows.copy_(torch.cat([chosen[last].unsqueeze(1), drafts], 1))
        self.inputs[1::2].view(2, *rows.shape).add_((self.right + 1).unsqueeze(1))  # positions and slots

    def count(self, rows: Tensor, chosen: Tensor) -> None:
        """Count the drafts of `rows` before the first one that differs from the token that was chosen in its place: the
        first of the largest numbers in a row of 1 for a wrong draft and 0 for a right one, that ends with 1."""
        torch.ne(rows[:, 1:], chosen[:, :-1], out=self.wrong[:, :-1])
        ops.choose(ChoiceCall(self.wrong, self.right, self.choices, dependent=True, mailbox=self.counts))

    def right_of(self, written: Written) -> list[int]:
        """The right drafts of a step, whose result was waited for."""
        found: list[int] = (self.right if self.counts is None else self.counts.tokens[written.turn % SENT]).tolist()
        return found
