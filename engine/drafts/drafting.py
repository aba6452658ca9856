"""Decode steps that check drafts: for up to MOST_SEQUENCES sequences of a cache at a time."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowbit.engine.drafts.check import Check
from lowbit.engine.drafts.drafter import NOTHING, Drafter, Proposal
from lowbit.engine.drafts.gauge import Gauge
from lowbit.engine.drafts.heads import Heads
from lowbit.engine.drafts.round import Round
from lowbit.engine.drafts.widths import ROWS, WIDTHS
from lowbit.engine.generate import begin_batch, deliver
from lowbit.engine.request import Request
from lowbit.engine.runner import Runner, Written
from lowbit.engine.sampler import Chosen, Features, features_of
from lowbit.engine.sampling import Piece
from lowbit.engine.workspace import Workspace
from lowbit.errors import EngineError

# Set the masks (rows, words) of the rows that check these drafts; the numbers of drafts that the rules allow.
Masks = Callable[[Tensor, Sequence[Sequence[int]]], list[int]]


@dataclass
class Given:
    """The part of a sequence that a drafter knows: the request whose text it is, and the number of its tokens."""

    request: Request
    count: int


class Drafting:
    """Steps with drafts over a workspace's cache.

    most      drafts of a step, for each sequence
    round     the runner whose inputs are those of the next step, drafts included; None: drafts must be proposed first
    launched  its steps that the host has not taken yet
    arrived   when the last of its results was taken; None: there was none
    """

    def __init__(self, space: Workspace, drafter: Drafter, most: int) -> None:
        self.space, self.drafter, self.most = space, drafter, min(most, drafter.most)
        self.gauge = Gauge(space.pool.costs)
        self.given: dict[int, Given] = {}
        self.requests: list[Request] = []
        self.sequences: list[int] = []
        self.fresh: list[list[int]] = []
        self.features = Features()
        self.round: Round | None = None
        self.launched = deque[Written]()
        self.arrived: float | None = None

    def start(self, requests: Sequence[Request], sequences: Sequence[int], features: Features) -> None:
        """Write these requests from now on, each of which has at least one token.

        sequences  of the cache, which holds all tokens of each request but the last
        """
        self.requests, self.sequences, self.features = list(requests), list(sequences), features
        self.space.base(features, len(requests)).start([request.constraints for request in requests])
        self.fresh = [[] for _ in requests]
        self.round = None
        self.launched.clear()

    @property
    def widths(self) -> list[int]:
        """The numbers of rows that each sequence may have in the next step."""
        assert self.space.cache is not None
        rooms = [reach_of(request, self.space.cache.context) - places_of(request)[0] for request in self.requests]
        most = min(1 + self.most, ROWS // len(self.requests), *rooms)
        return [width for width in sorted({*WIDTHS, 1 + self.most}) if width <= most] or [1]

    def step(self, masks: Masks | None = None) -> list[Piece]:
        """Run one step; the piece of each request."""
        begun, usual = time.perf_counter(), self.drafter.usual
        if usual is None:
            return self.placed(begun, *self.looked_up(), masks)
        width = self.gauge.width([usual] * len(self.requests), self.widths)
        if self.launched or (masks is None and width > 1 and self.roomy(width)):
            return self.followed(begun, width)
        return self.placed(begun, width, self.propose(width - 1) if width > 1 else self.nothing, masks)

    def placed(self, begun: float, width: int, proposals: list[Proposal], masks: Masks | None) -> list[Piece]:
        """The pieces of a step that checks these proposals."""
        self.round = None
        drafts = [list(proposal.tokens[: width - 1]) for proposal in proposals]
        runner, drafted = self.runner(width), time.perf_counter()
        known = not runner.captures or bool(runner.graphs)
        self.place(runner, width, drafts)
        if masks is None:
            runner.advance()
        else:
            drafts = self.masked(runner, masks, drafts)
        chosen = runner.written().wait()
        ended = time.perf_counter()
        if known and (width == 1 or self.drafter.steady):
            self.gauge.costs.note(len(drafts), width, ended - begun)
        self.gauge.costs.spend(drafted - begun, ended - drafted)
        pieces = []
        for index, (proposal, draft) in enumerate(zip(proposals, drafts, strict=True)):
            kept = accepted(draft, chosen.tokens[index * width :][: 1 + len(draft)].tolist())
            pieces.append(self.take(index, proposal, len(draft), kept, self.rows(chosen, index * width)))
        return pieces

    def followed(self, begun: float, width: int) -> list[Piece]:
        """The pieces of a step that also writes the next one's drafts. That one is launched before they are known."""
        if not self.launched and (self.round is None or self.round.adjacent != width):
            self.round, self.arrived = self.primed(width), None
        round, usual = self.round, self.drafter.usual
        assert round is not None
        assert usual is not None
        while len(self.launched) <= round.ahead and round.adjacent == width and self.roomy(width):
            self.launched.append(round.launch())
        written = self.launched.popleft()
        waits, before = written.running or not round.captures, self.arrived
        chosen, right = written.wait(), round.right_of(written)
        self.arrived = time.perf_counter()
        seconds = self.arrived - (begun if before is None else before)
        self.gauge.costs.follow(len(right), round.adjacent, seconds)
        if before is not None and waits:  # else the host was late, and the time is its own
            self.gauge.costs.note(len(right), round.adjacent, seconds)
        pieces = []
        for index, (sequence, request) in enumerate(zip(self.sequences, self.requests, strict=True)):
            checked, first = min(round.adjacent, request.left) - 1, index * round.adjacent
            kept = chosen.tokens[first : first + 1 + min(right[index], checked)].tolist()
            # all tokens but the last, with which the drafter goes on if it must propose again
            self.given[sequence] = Given(request, len(request.sequence) + len(kept) - 1)
            assert isinstance(self.drafter, Heads)
            self.drafter.follow(sequence, self.given[sequence].count - 1)
            pieces.append(self.take(index, usual, checked, kept, self.rows(chosen, first)))
        return pieces

    def primed(self, width: int) -> Round:
        """The runner of steps that write drafts, with the inputs of the next one."""
        drafts = [list(proposal.tokens) for proposal in self.propose(width - 1)]
        cache = self.space.cache
        assert cache is not None
        length = min(self.length + 2 * ROWS, cache.context)  # steps that were launched early pass the end of a text
        found = self.space.round(len(self.requests), width, cache.batch, length, self.features)
        self.place(found, width, drafts)
        return found

    def roomy(self, width: int) -> bool:
        """True if steps of this width fit behind every text: those that were launched, one more, and the one before a
        capture."""
        assert self.space.cache is not None
        ahead = (2 + len(self.launched)) * width
        rooms = (reach_of(each, self.space.cache.context) - places_of(each)[0] for each in self.requests)
        return isinstance(self.drafter, Heads) and min(rooms) >= ahead

    @property
    def nothing(self) -> list[Proposal]:
        """No draft for any request."""
        return [NOTHING] * len(self.requests)

    def looked_up(self) -> tuple[int, list[Proposal]]:
        """The width of the next step, and its drafts, which cost nothing."""
        widths = self.widths
        proposals = self.propose(widths[-1] - 1) if widths[-1] > 1 else self.nothing
        return self.gauge.width(proposals, widths), proposals

    @property
    def wakes(self) -> bool:
        """True if drafts that cost nothing pay again, while steps are written without them."""
        return self.drafter.usual is None and self.looked_up()[0] > 1

    def propose(self, most: int) -> list[Proposal]:
        """The drafter's proposals. EngineError for tokens outside the vocabulary."""
        for sequence, request in zip(self.sequences, self.requests, strict=True):
            self.tell(sequence, request)
        proposals, vocabulary = self.drafter.propose(self.sequences, most), self.space.decoder.architecture.vocabulary
        for proposal in proposals:
            wrong = next((token for token in proposal.tokens if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise EngineError(f"the drafter proposes token {wrong}, none of the model's {vocabulary}")
        return [
            Proposal(proposal.tokens[: min(most, request.left - 1)], proposal.kind, proposal.chance)
            for proposal, request in zip(proposals, self.requests, strict=True)
        ]

    def tell(self, sequence: int, request: Request) -> None:
        """Let the drafter know the tokens of a request that it does not know yet."""
        given, tokens = self.given.get(sequence), request.sequence
        if given is None or given.request is not request:
            self.drafter.begin(sequence, tokens[:1])
            given = Given(request, 1)
        self.drafter.extend(sequence, tokens[given.count :], self.taken(sequence, given.count - 1, len(tokens) - 1))
        self.given[sequence] = Given(request, len(tokens))

    def taken(self, sequence: int, first: int, last: int) -> Tensor | None:
        """The outputs of the drafter's taps at the positions from `first` to before `last`; None without taps."""
        cache = self.space.cache
        assert cache is not None
        if not self.drafter.taps or cache.features is None:
            return None
        return cache.features[cache.start(sequence) + first : cache.start(sequence) + last]

    @property
    def length(self) -> int:
        """The most positions of any request."""
        return max(len(request.prompt) + request.most for request in self.requests)

    def runner(self, width: int) -> Runner:
        """The runner of a step with so many rows of each sequence."""
        assert self.space.cache is not None
        return self.space.checking(len(self.requests), width, self.space.cache.batch, self.length, self.features)

    def place(self, runner: Runner, width: int, drafts: Sequence[Sequence[int]]) -> None:
        """Set the inputs of a step. Rows behind a sequence's drafts have any token."""
        tokens, positions, starts = list[int](), list[int](), list[int]()
        for request, sequence, draft in zip(self.requests, self.sequences, drafts, strict=True):
            place, last = places_of(request)
            tokens += [last, *draft, *[0] * (width - 1 - len(draft))]
            positions += range(place, place + width)
            starts += [runner.cache.start(sequence)] * width
        runner.place(tokens, positions, starts)
        assert isinstance(runner.sampler, Check)
        runner.sampler.place([len(request.tokens) for request in self.requests], self.fresh)

    def masked(self, runner: Runner, masks: Masks, drafts: Sequence[list[int]]) -> list[list[int]]:
        """Run a step whose rows have masks; the drafts that these allow."""
        assert runner.sampler is not None
        runner.run(0)
        allowed = masks(runner.sampler.allowed, drafts)
        runner.run(1)
        return [draft[:count] for draft, count in zip(drafts, allowed, strict=True)]

    def rows(self, chosen: Chosen, first: int) -> Chosen:
        """The result of the rows from `first` on."""
        if chosen.logprobs is None or chosen.top is None:
            return Chosen(chosen.tokens[first:])
        return Chosen(chosen.tokens[first:], chosen.logprobs[first:], chosen.top[first:])

    def take(self, index: int, proposal: Proposal, checked: int, kept: list[int], rows: Chosen) -> Piece:
        """Give a request the tokens that were chosen for it.

        kept  one token for each right one of so many drafts that were checked, and one more
        rows  the result of its rows
        """
        request = self.requests[index]
        self.gauge.note(proposal, checked, len(kept) - 1)
        self.fresh[index] = kept
        request.drafts.note(checked, len(kept) - 1)
        piece = request.take(kept)
        if rows.logprobs is not None and rows.top is not None:
            for row, token in enumerate(piece.tokens):
                request.note(token, rows.logprobs[row], rows.top[row])
        if piece.finish_reason:
            self.end(index)
        return piece

    def end(self, index: int) -> None:
        """Let the drafter know the rest of a text, and its end."""
        request, sequence = self.requests[index], self.sequences[index]
        given = self.given.get(sequence)
        if given is not None and given.request is request:
            self.tell(sequence, request)
            self.drafter.end(sequence)
            del self.given[sequence]


def places_of(request: Request) -> tuple[int, int]:
    """The position of a request's last token, and that token."""
    return len(request.prompt) + len(request.tokens) - 1, request.tokens[-1]


def reach_of(request: Request, context: int) -> int:
    """The positions that the next step may fill before the sequence is full, or read again."""
    return request.short if request.short is not None and request.before_turn else context


def accepted(draft: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """The model's own tokens: one for each draft token that it agrees with, and one more."""
    right = next((i for i, token in enumerate(draft) if token != chosen[i]), len(draft))
    return list(chosen[: right + 1])


def run_drafted(drafting: Drafting, batch: Sequence[Request]) -> Iterator[Piece]:
    """Serve requests, one per sequence of the cache, until each is finished or must be read again."""
    space, features = drafting.space, features_of([request.constraints for request in batch])
    length = max(len(request.prompt) + request.most for request in batch)
    space.roomy_reader(len(batch), length)
    yield from begin_batch(space.roomy_reader(len(batch), length), space.sampler(features, len(batch)), batch)
    drafting.requests = []
    while left := [request for request in batch if request.left]:
        if left != drafting.requests:
            drafting.start(left, [batch.index(request) for request in left], features)
        if drafting.gauge.rest:
            yield from plain(drafting, length)
            drafting.requests = []
        else:
            yield from drafting.step()


def plain(drafting: Drafting, length: int) -> Iterator[Piece]:
    """Some steps without drafts, of which the host launches one ahead."""
    requests, features = drafting.requests, drafting.features
    assert drafting.space.cache is not None
    runner = drafting.space.runner(len(requests), drafting.space.cache.batch, length, features)
    assert runner.sampler is not None
    runner.sampler.start([request.constraints for request in requests])
    places = [places_of(request) for request in requests]
    starts = [runner.cache.start(sequence) for sequence in drafting.sequences]
    runner.place([token for _, token in places], [place for place, _ in places], starts)
    for chosen in runner.steps(min(drafting.gauge.rest, *(request.left for request in requests))):
        yield from deliver(requests, chosen)
        if not all(request.left for request in requests) or drafting.wakes:
            return
