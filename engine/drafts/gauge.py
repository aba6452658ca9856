"""The number of drafts that pays: by the shares of right ones so far, and by what a step costs with more rows.

No text depends on it: a draft changes the number of steps, never a token.
"""

from collections import Counter
from collections.abc import Sequence

from lowbit.engine.drafts.drafter import Proposal
from lowbit.engine.drafts.widths import MOST_SEQUENCES, ROWS

WEIGHT = 0.1  # of a new measurement
FORGOTTEN = 0.003  # of a share's distance from its first guess, for each step without such a draft
ODD = 3.0  # times the usual seconds: a measurement counts as no more
A_ROW = 0.02  # cost of a row more, in steps, before it was measured
PATIENT = 16  # steps without a draft, until some steps are written without asking for drafts
MOST_REST = 32


class Costs:
    """Seconds of a step by (sequences, rows of each).

    fixed  True: the given costs are kept, and nothing is measured
    drafting, checking  seconds spent on drafts, and on steps that check them
    following  seconds of steps that do both
    followed   numbers of these by (sequences, rows of each)
    """

    def __init__(self, seconds: dict[tuple[int, int], float] | None = None, fixed: bool = False) -> None:
        self.seconds, self.fixed = dict(seconds or {}), fixed
        self.forget()

    def forget(self) -> None:
        """Begin to add up at nothing."""
        self.drafting = self.checking = self.following = 0.0
        self.followed = Counter[tuple[int, int]]()

    def spend(self, drafting: float, checking: float) -> None:
        """Add up the seconds of a step's drafts and of their check."""
        self.drafting, self.checking = self.drafting + drafting, self.checking + checking

    def follow(self, sequences: int, width: int, seconds: float) -> None:
        """Add up the seconds of a step that checks drafts and writes the next ones."""
        self.following += seconds
        self.followed[sequences, width] += 1

    def note(self, sequences: int, width: int, seconds: float) -> None:
        """Take a measured step into account."""
        if self.fixed:
            return
        known = self.seconds.get((sequences, width))
        new = seconds if known is None else known + WEIGHT * (min(seconds, ODD * known) - known)
        self.seconds[sequences, width] = new

    def of(self, sequences: int, width: int) -> float:
        """The seconds of a step, guessed from narrower ones if it was never measured; that of one row is known."""
        narrower = next(each for each in range(width, 0, -1) if (sequences, each) in self.seconds)
        return self.seconds[sequences, narrower] * (1 + A_ROW * sequences * (width - narrower))

    def knows(self, sequences: int) -> bool:
        """True if a step of one row of each sequence was measured: without it nothing can be said to pay."""
        return (sequences, 1) in self.seconds


def as_wide_as_may_be() -> Costs:
    """Costs by which a step checks as many drafts as it may, whatever they cost and save."""
    shapes = ((sequences, width) for sequences in range(1, MOST_SEQUENCES + 1) for width in range(1, ROWS + 1))
    return Costs({(sequences, width): 1 / width for sequences, width in shapes}, fixed=True)


class Gauge:
    """Shares of right drafts by kind and place, and the choice of a step's width from them.

    costs  of steps; shared by all gauges of an engine
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.shares: dict[tuple[int, int], float] = {}
        self.idle = 0

    def share(self, proposal: Proposal, place: int) -> float:
        """The probability that a draft is right if those before it are; that of the place before if unknown."""
        for known in range(place, -1, -1):
            if (proposal.kind, known) in self.shares:
                return self.shares[proposal.kind, known]
        return proposal.chance

    def expected(self, proposal: Proposal, most: int) -> float:
        """The tokens that a step is expected to write with at most so many drafts of a proposal."""
        tokens = reached = 1.0
        for place in range(min(len(proposal.tokens), most)):
            reached *= self.share(proposal, place)
            tokens += reached
        return tokens

    def width(self, proposals: Sequence[Proposal], widths: Sequence[int]) -> int:
        """The rows of each sequence with which a step writes most tokens a second: one of `widths`, in ascending
        order."""
        sequences = len(proposals)
        if not self.costs.knows(sequences):
            return 1

        def rate(width: int) -> float:
            tokens = sum(self.expected(proposal, width - 1) for proposal in proposals)
            return tokens / self.costs.of(sequences, width)

        best = max(widths, key=rate)
        self.idle = 0 if best > 1 else self.idle + 1
        if best == 1:
            for proposal in proposals:
                self.forget(proposal)
        return best

    def forget(self, proposal: Proposal) -> None:
        """Move the shares of a kind that was not tried towards the first guess, so that it is tried again some time."""
        for (kind, place), share in self.shares.items():
            if kind == proposal.kind and proposal.tokens:
                self.shares[kind, place] = share + FORGOTTEN * (proposal.chance - share)

    def note(self, proposal: Proposal, checked: int, right: int) -> None:
        """Take into account that of a proposal so many drafts were checked, and so many of them were right."""
        for place in range(min(right + 1, checked)):
            share = self.share(proposal, place)
            self.shares[proposal.kind, place] = share + WEIGHT * ((place < right) - share)

    @property
    def rest(self) -> int:
        """Steps to write before drafts are asked for again."""
        return min(self.idle // PATIENT * (PATIENT // 4), MOST_REST)
