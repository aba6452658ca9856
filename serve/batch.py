"""The batch: jobs that read their prompts and jobs that write, over one cache. Jobs enter and leave between steps."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.engine.engine import Engine
from lowbit.engine.generate import score_rows
from lowbit.engine.passes import SHARED_COUNTS, Reader
from lowbit.engine.prefill import chunk_by_layers
from lowbit.engine.runner import Runner, Written, on_host
from lowbit.engine.sampler import Chosen, Features, Sampler, features_of
from lowbit.engine.sampling import Piece, Sampling
from lowbit.engine.workspace import Workspace, on_gpu
from lowbit.errors import EngineError
from lowbit.serve.drafts import NO_LOOKUP, Drafts, Lookup, fill_rows, unmasked
from lowbit.serve.job import Job, Update
from lowbit.serve.pace import BETWEEN_STEPS, Pace, Part
from lowbit.serve.slots import Slots
from lowbit.serve.warm import REST_ROWS, Choice, Chunk, Graph, Run, expected

PASS_ROWS = 1024  # of a captured pass while other requests write: 30 ms with Llama-2-7B on an H200
RUNNERS = 64  # captured graphs: numbers of rows, times lengths, times the features of sampling
EVERY = Features(sampled=True, truncated=True, penalized=True, bad_words=1, logprobs=True, masked=True)
# The times of a captured step of REST_ROWS rows, and of the least chunk without a graph, in tokens of a captured pass.
# Llama-2-7B in 4 bits on an H200: 3.0 ms, 24 ms (100 ms with up to 16 rows), and 28 ms for a pass of 1024 tokens.
STEP_COST, CHUNK_COST = 110, 860


class Batch:
    """Jobs in the slots of a cache of `sequences` sequences. Only one thread may use it.

    reading  jobs whose prompts are read, in order; the first one is read, chunk by chunk
    part     the chunk of it that is not read to its end yet
    writing  jobs that get one token a step
    placed   those that wrote when the runner's rows were last set, in their order; `stale` once others write
    drafted  True if their steps have drafts
    cold     runs that spare expected requests a first one: see warm.py
    """

    def __init__(
        self, engine: Engine, sequences: int, usual: Sequence[Sampling] = (), lookup: Lookup = NO_LOOKUP
    ) -> None:
        self.engine, self.decoder, self.context = engine, engine.decoder, engine.options.context
        self.space, self.slots = Workspace(engine.spaces, RUNNERS), Slots(sequences)
        self.pace = Pace(engine.decoder.weights.device.type)
        self.drafts = Drafts(self.space, lookup)
        self.reading: list[Job] = []
        self.part: Part | None = None
        self.writing: list[Job] = []
        self.placed: list[Job] = []
        self.stale = False
        self.drafted = False
        self.runner: Runner | None = None
        self.launched: deque[Written] = deque()
        self.cold = expected(self.reader(), usual)

    @property
    def jobs(self) -> list[Job]:
        """All jobs with a slot."""
        return [*self.reading, *self.writing]

    @property
    def has_work(self) -> bool:
        """True if a turn has something to do for a request."""
        return bool(self.reading or self.writing or self.stale)

    def reader(self) -> Reader:
        """The reader of the cache, which is allocated once with all its positions."""
        return self.space.roomy_reader(len(self.slots.all), self.context)

    def enter(self, job: Job) -> None:
        """Give a job a free slot."""
        job.slot = self.slots.take(job.request.prompt)
        self.reading.append(job)

    def leave(self, job: Job) -> None:
        """Take a job out. Its slot keeps the tokens that it holds."""
        assert job.slot is not None
        if job in self.reading:
            if job is self.reading[0]:
                self.part = None
            self.reading.remove(job)
        else:
            self.writing.remove(job)
            self.stale = True
            job.slot.tokens = job.request.sequence[:-1]
        self.slots.release(job.slot)

    def reset(self) -> None:
        """Forget all jobs, and what the cache holds: after an error nothing of it is certain."""
        self.reading, self.writing, self.placed, self.runner, self.stale = [], [], [], None, False
        self.part = None
        self.drafts.reset()
        self.launched.clear()
        self.space.clear()
        self.slots = Slots(len(self.slots.all))
        self.cold.clear()

    def turn(self) -> None:
        """Read at most one chunk of a prompt, or layers of it, then write one token of each writing job. Without a job,
        run what is cold."""
        with self.engine.lock, torch.inference_mode():
            if self.reading:
                self.try_read(self.reading[0])
            if self.writing or self.stale:
                self.step()
            elif not self.reading and self.cold:
                self.warm(self.cold.popleft())

    def warm(self, run: Run) -> None:
        """One run. It uses the slot that holds the fewest tokens, which forgets them."""
        slot = min(self.slots.all, key=lambda slot: len(slot.tokens))
        slot.clear()
        try:
            if isinstance(run, Choice):
                self.choose_once()
            elif isinstance(run, Chunk):
                part = 0, run.length
                next(chunk_by_layers(self.decoder, self.reader().cache, slot.sequence, [0] * run.length, part))
            elif run.rows:
                self.step_once(run, slot.sequence)
            else:
                self.pass_over([(slot.sequence, [0] * run.length)] * run.prompts)
        except torch.OutOfMemoryError:  # memory is for requests
            self.cold.clear()

    def choose_once(self) -> None:
        """A choice with every feature, launched plainly, and its way to the host."""
        device, vocabulary = self.decoder.weights.device, self.decoder.architecture.vocabulary
        sampler = self.space.sampler(EVERY, 1)
        sampler.start([self.engine.request(0, [0], Sampling()).constraints])
        chosen = sampler(torch.zeros(1, vocabulary, device=device))
        if on_gpu(device):
            on_host(chosen)

    def step_once(self, graph: Graph, sequence: int) -> None:
        """A step over the first position of a sequence."""
        usual = graph.sampling
        constraints = None if usual is None else self.engine.request(0, [0], usual).constraints
        features = None if constraints is None else features_of([constraints])
        runner = self.space.runner(graph.rows, len(self.slots.all), graph.length, features)
        if runner.sampler is not None and constraints is not None:
            runner.sampler.start([constraints] * graph.rows)
        runner.warm_up = 0 if graph.loaded else runner.warm_up
        runner.spread()
        runner.place([0] * graph.rows, [0] * graph.rows, [runner.cache.start(sequence)] * graph.rows)
        runner.advance()

    def try_read(self, job: Job) -> None:
        """Read one chunk of a job's prompt. If it does not fit in memory, that job alone ends with the error."""
        try:
            self.read(job)
        except EngineError as error:
            self.drop(job, error)

    def drop(self, job: Job, error: EngineError) -> None:
        """End a job with an error."""
        self.leave(job)
        job.tell(job, error)

    def read(self, job: Job) -> None:
        """Read one chunk of a job's prompt, or the whole together with others. After the last chunk, choose the first
        token."""
        if self.part is None:
            if not job.read:
                self.begin(job)
            if self.ends_in_steps(job, job.read):
                self.written_from([job], self.rest(job))
                return
        if self.part is None and not job.read and self.fits_pass(job):
            jobs = [job, *self.companions(job)]
            places = [(each.slot.sequence, each.request.sequence) for each in jobs if each.slot is not None]
            if job.request.wants_prompt_logprobs:
                self.take(job, torch.cat(list(self.reader().read(*places[0]))))
            else:
                self.written_from(jobs, self.decoder.logits(torch.cat(self.pass_over(places))))
            return
        hidden = self.chunk(job)
        if hidden is not None:
            self.take(job, hidden)

    def take(self, job: Job, hidden: Tensor) -> None:
        """Note that the next rows of a job's prompt are read. After the last one, choose the first token.

        hidden  (rows, hidden)
        """
        job.read += len(hidden)
        assert job.slot is not None
        job.slot.tokens = job.request.sequence[: job.read]
        if job.request.wants_prompt_logprobs:
            wanted = job.request.sampling.logprobs or 0
            logits = score_rows(self.decoder, hidden, job.request.sequence, wanted, job.scores).unsqueeze(0)
        elif job.read == len(job.request.sequence):
            logits = self.decoder.logits(hidden[-1:])
        if job.read == len(job.request.sequence):
            self.written_from([job], logits)

    def written_from(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """Choose the first tokens of jobs whose whole prompts are read, from the logits (jobs, vocabulary) after
        them."""
        for job in jobs:
            assert job.slot is not None
            job.read, job.slot.tokens = len(job.request.sequence), job.request.sequence
            self.reading.remove(job)
            self.writing.append(job)
        self.stale = True
        self.first(jobs, logits)

    def begin(self, job: Job) -> None:
        """Find the part of a job's sequence that the cache already holds, and move it to the job's slot."""
        request, slot = job.request, job.slot
        assert slot is not None
        request.begin()
        sequence, short = request.sequence, self.decoder.short
        long = short is not None and len(sequence) > short
        source, count = self.slots.nearest(sequence, long, slot)
        count = 0 if request.wants_prompt_logprobs else min(count, len(sequence) - 1)
        steps_are_less = steps_for(len(sequence) - count) * STEP_COST < len(sequence)
        if self.fits_pass(job) and not (self.ends_in_steps(job, count) and steps_are_less):
            count = 0
        if source is not slot and count:
            self.reader().cache.copy(source.sequence, slot.sequence, count)
        slot.tokens, slot.long = sequence[:count], long
        job.read = job.reused = count

    def ends_in_steps(self, job: Job, read: int) -> bool:
        """True if captured steps read a sequence after `read` tokens faster than a chunk, which the host launches one
        kernel after another. Not for sequences whose ropes change: a step sees each row as the last of its sequence."""
        rest = len(job.request.sequence) - read
        simple = self.decoder.short is None and not job.request.wants_prompt_logprobs
        return bool(read and simple and self.reader().lengths) and steps_for(rest) * STEP_COST < CHUNK_COST

    def rest(self, job: Job) -> Tensor:
        """Logits (1, vocabulary) after the rest of a sequence. Rows beyond its end repeat the last one."""
        assert job.slot is not None
        sequence, cache = job.request.sequence, self.reader().cache
        runner = self.space.runner(REST_ROWS, cache.batch, len(sequence))
        for first in range(job.read, len(sequence), REST_ROWS):
            places = [min(first + row, len(sequence) - 1) for row in range(REST_ROWS)]
            starts = [cache.start(job.slot.sequence)] * REST_ROWS
            runner.place([sequence[place] for place in places], places, starts)
            runner.advance()
        assert runner.logits is not None
        return runner.logits[-1:]

    def fits_pass(self, job: Job) -> bool:
        """True if a captured pass may read the whole sequence: see passes.py. Requests that write do not wait for long
        ones."""
        longest = max(self.reader().lengths, default=0)
        return len(job.request.sequence) <= (min(longest, PASS_ROWS) if self.writing else longest)

    def companions(self, job: Job) -> list[Job]:
        """The next jobs whose whole prompts one pass reads together with that of `job`: one after another, each of a
        crowd of short prompts would wait for a pass and a step of all before it."""
        found: list[Job] = []
        for other in self.reading[1:] if self.may_share(job) else ():
            if len(found) + 1 < SHARED_COUNTS[-1] and not other.read and self.may_share(other):
                self.begin(other)
                found += [] if other.read else [other]
        return found

    def may_share(self, job: Job) -> bool:
        """True if a job's prompt is short enough to share a pass, and none of its log-probabilities are wanted."""
        short = len(job.request.sequence) <= self.reader().longest_shared
        return short and not job.request.wants_prompt_logprobs

    def pass_over(self, given: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Hidden states (1, hidden) after whole prompts, each a sequence of the cache and its tokens."""
        if len(given) > 1:
            return self.reader().read_together(given)
        *_, last = self.reader().read(*given[0], end=True)
        return [last[-1:]]

    def chunk(self, job: Job) -> Tensor | None:
        """Hidden states (rows, hidden) of the next rows of a sequence, timed; None if others write a token first."""
        assert job.slot is not None
        if self.part is None:
            place, rows = job.slot.sequence, self.pace.rows()
            cache, tokens = self.reader().cache, job.request.sequence
            work = chunk_by_layers(self.decoder, cache, place, tokens, (job.read, rows))
            self.part = Part(work, rows, self.decoder.weights.device)
        part, hidden = self.part, self.part.advance(BETWEEN_STEPS if self.writing else None)
        if hidden is not None:
            self.part = None
            if len(hidden) == part.rows:
                self.pace.note(part.rows, part.seconds)
        return hidden

    def first(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """Choose jobs' first tokens from the logits (jobs, vocabulary) after their prompts."""
        for job in jobs:
            if job.request.wants_prompt_logprobs:
                job.request.prompt_logprobs = job.scores
        sampler = self.space.sampler(features_for(jobs), len(jobs))
        sampler.start([job.request.constraints for job in jobs])
        self.mask(jobs, sampler)
        self.deliver(jobs, sampler(logits))

    def step(self) -> None:
        """Write one token of each writing job, or several with drafts. On a GPU the step before is delivered while this
        one runs, without drafts."""
        drafted = self.drafts.wanted(self.writing)
        if drafted != self.drafted:
            self.drafted, self.stale = drafted, True
        if self.stale:
            while self.launched:
                self.deliver(self.placed, self.launched.popleft().wait())
            self.place()
        if self.drafted and self.placed:
            self.drafted_step()
        if self.runner is None:
            return
        if self.runner.masked:
            self.masked_step(self.runner)
            return
        self.launched.append(self.runner.launch())
        if len(self.launched) > self.runner.ahead:
            self.deliver(self.placed, self.launched.popleft().wait())

    def drafted_step(self) -> None:
        """One step with drafts."""
        masks = self.mask_drafts if features_for(self.placed).masked else None
        for job, piece in zip(self.placed, self.drafts.step(masks), strict=True):
            if job in self.writing:
                self.follow(job, piece)

    def mask_drafts(self, allowed: Tensor, drafts: Sequence[Sequence[int]]) -> list[int]:
        """Set the masks of the rows that check drafts of the placed jobs; the numbers of drafts that they allow."""
        masks, counts = unmasked(allowed), [len(draft) for draft in drafts]
        for i, rows in enumerate(masks.view(len(drafts), -1, masks.shape[1])):
            grammar = self.placed[i].grammar
            if grammar is not None:
                try:
                    counts[i] = fill_rows(grammar, rows, drafts[i])
                except EngineError as error:
                    self.drop(self.placed[i], error)
        allowed.copy_(masks, non_blocking=True)
        return counts

    def masked_step(self, runner: Runner) -> None:
        """One step with grammars. The logits are computed while the tokens of the step before reach the grammars."""
        assert runner.sampler is not None
        runner.run(0)
        while self.launched:
            self.deliver(self.placed, self.launched.popleft().wait())
        self.mask(self.placed, runner.sampler)
        runner.run(1)
        self.launched.append(runner.written())

    def mask(self, jobs: Sequence[Job], sampler: Sampler) -> None:
        """Set the masks of the next step. Jobs without a grammar may have any token."""
        if not sampler.features.masked:
            return
        masks = unmasked(sampler.allowed)
        for row, job in zip(masks, jobs, strict=False):
            if job.grammar is not None and job in self.writing:
                try:
                    job.grammar.fill(row)
                except EngineError as error:
                    self.drop(job, error)
        masks[len(jobs) :] = masks[0]
        sampler.allowed.copy_(masks, non_blocking=True)

    def place(self) -> None:
        """Set the runner for the jobs that write now. Rows beyond them repeat the first job, to the same effect."""
        self.placed, self.runner, self.stale = list(self.writing), None, False
        if not self.placed:
            return
        if self.drafted:
            self.drafts.start(self.placed, features_for(self.placed))
            return
        constraints = [job.request.constraints for job in self.placed]
        length, cache = max(job.length for job in self.placed), self.reader().cache
        rows = rows_for(len(self.placed), cache.layers[0].k.is_cuda)
        runner = self.space.runner(rows, cache.batch, length, features_for(self.placed))
        assert runner.sampler is not None
        runner.spread()
        fill = rows - len(self.placed)
        runner.sampler.start(constraints + constraints[:1] * fill)
        jobs = self.placed + self.placed[:1] * fill
        runner.place(
            [job.request.tokens[-1] for job in jobs],
            [len(job.request.sequence) - 1 for job in jobs],
            [cache.start(job.slot.sequence) for job in jobs if job.slot is not None],
        )
        self.runner = runner

    def deliver(self, jobs: Sequence[Job], chosen: Chosen) -> None:
        """Pass a step's tokens to the jobs that are still in the batch. Finished ones leave."""
        for row, (job, token) in enumerate(zip(jobs, chosen.tokens.tolist(), strict=False)):
            request = job.request
            if job not in self.writing or not request.left:
                continue
            if chosen.logprobs is not None and chosen.top is not None:
                request.note(token, chosen.logprobs[row], chosen.top[row])
            self.follow(job, request.take([token]))

    def follow(self, job: Job, piece: Piece) -> None:
        """Take a job's grammar along the tokens of a piece, and pass it on."""
        if job.grammar is not None and not piece.finish_reason:
            try:
                for token in piece.tokens:
                    job.grammar.take(token)
            except EngineError as error:
                self.drop(job, error)
                return
            piece = job.request.end(piece) if job.grammar.ended else piece
        self.pass_on(job, piece)

    def pass_on(self, job: Job, piece: Piece) -> None:
        """Pass a piece on. A job that it finishes leaves."""
        if piece.finish_reason:
            self.leave(job)
        elif not job.request.left:
            self.again(job)
        job.tell(job, Update(piece, tuple(job.request.logprobs[-len(piece.tokens) :])))

    def again(self, job: Job) -> None:
        """Read a sequence again that has reached the position where the ropes change."""
        assert job.slot is not None
        self.writing.remove(job)
        self.stale = True
        job.slot.clear()
        job.read = 0
        self.reading.append(job)


def steps_for(tokens: int) -> int:
    """Steps of REST_ROWS rows that read so many tokens."""
    return -(-tokens // REST_ROWS)


def features_for(jobs: Sequence[Job]) -> Features:
    """The features of sampling that the jobs need."""
    masked = any(job.grammar is not None for job in jobs)
    return replace(features_of([job.request.constraints for job in jobs]), masked=masked)


def rows_for(jobs: int, on_gpu: bool) -> int:
    """Rows of a step for this number of jobs. On a GPU a power of two: each number of rows has its own graphs."""
    return 1 << (jobs - 1).bit_length() if on_gpu else jobs
