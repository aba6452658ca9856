"""A session: a thread that serves requests from any number of threads, all in one batch."""

import logging
import queue
import threading
import time
from collections.abc import Generator, Sequence

import torch

from lowbit.engine.engine import Engine
from lowbit.engine.prefill import shortage
from lowbit.engine.request import Request
from lowbit.engine.sampling import Piece, Sampling
from lowbit.errors import EngineError
from lowbit.serve.batch import Batch
from lowbit.serve.drafts import NO_LOOKUP, Lookup
from lowbit.serve.job import Constraint, Job, Tell, Update
from lowbit.serve.warm import RESTED

LOG = logging.getLogger("lowbit.serve")
SEQUENCES = 8
WAITING = 64
SHUTTING_DOWN = "the server is shutting down"


class Busy(EngineError):
    """The queue is full."""


class Failed(EngineError):
    """An error of ours ended the request."""


class Ended(EngineError):
    """The session ends, or has ended."""


class Session:
    """Requests over one engine. Use it as a context, or call `close`.

    sequences  requests served at a time; the cache has memory for all positions of each
    waiting    most requests in the queue
    usual      samplings of most requests: their graphs are captured while there is no work
    lookup     drafts from the text
    """

    def __init__(
        self,
        engine: Engine,
        sequences: int = SEQUENCES,
        waiting: int = WAITING,
        usual: Sequence[Sampling] = (),
        lookup: Lookup = NO_LOOKUP,
    ) -> None:
        self.engine, self.most = engine, waiting
        self.batch = Batch(engine, sequences, usual, lookup)
        self.queue: list[Job] = []
        self.changed = threading.Condition()
        self.closed = False
        self.worked = time.monotonic()  # the time of the last turn for a request
        self.thread = threading.Thread(target=self.run, name="lowbit-session", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, and wait for it. Requests that are not finished get an error."""
        self.end()
        self.thread.join()

    def end(self) -> None:
        """Let the thread end after its turn."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def submit(
        self, requests: Sequence[Request], tell: Tell, client: str = "", grammars: Sequence[Constraint | None] = ()
    ) -> list[Job]:
        """Put requests into the queue, all or none. `tell` gets their updates on the session's thread.

        grammars  of the requests; none at all by default

        Busy if the queue has no room. EngineError for beams and drafts, which share no batch.
        """
        if any(request.sampling.beams > 1 or request.sampling.lookup for request in requests):
            raise EngineError("beams and lookup share no batch: leave them out, or use the engine itself")
        rules = grammars or [None] * len(requests)
        jobs = [Job(request, tell, client, rule) for request, rule in zip(requests, rules, strict=True)]
        with self.changed:
            if self.closed:
                raise Ended(SHUTTING_DOWN)
            self.require_room(len(jobs))
            self.queue += jobs
            self.changed.notify()
        return jobs

    def require_room(self, count: int) -> None:
        """Busy if the queue has no room for so many requests more. EngineError if it will never have."""
        most = max(self.most, len(self.batch.slots.all))
        if count > most:
            raise EngineError(f"{count} requests at once are more than the {most} that may wait: ask for fewer")
        with self.changed:
            if len(self.queue) + count > max(self.most, len(self.batch.slots.free)):
                raise Busy(
                    f"{len(self.queue)} requests wait, {count} more would pass the limit of {self.most}: try again"
                )

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs early. Their slots are free at the next step."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.changed.notify()

    def stream(self, prompt: str | Sequence[int], sampling: Sampling) -> Generator[Piece, None, None]:
        """The pieces of one request. Its slot is freed when the iterator is closed.

        Beams and drafts share no batch: the engine serves such a request alone.
        """
        if sampling.beams > 1 or sampling.lookup:
            yield from self.engine.stream([prompt], sampling)
            return
        updates: queue.SimpleQueue[Update | EngineError] = queue.SimpleQueue()
        jobs = self.submit([self.engine.request(0, prompt, sampling)], lambda _, update: updates.put(update))
        try:
            while True:
                update = updates.get()
                if isinstance(update, EngineError):
                    raise update
                yield update.piece
                if update.piece.finish_reason:
                    return
        finally:
            self.cancel(jobs)

    def run(self) -> None:
        """The thread: turns while there is work."""
        while self.wait():
            try:
                self.sort_out()
                if self.batch.has_work:
                    self.worked = time.monotonic()
                self.batch.turn()
            except torch.OutOfMemoryError as error:
                self.fail(EngineError(f"{len(self.batch.jobs)} sequences do not fit: {shortage(error)}"))
            except EngineError as error:
                self.fail(error)
            except Exception:  # the thread must go on: the next requests are not at fault
                LOG.exception("a step failed")
                self.fail(Failed("an error of the server ended the request; its log has more"))
        self.fail(Ended(SHUTTING_DOWN))
        with self.changed:
            left, self.queue = self.queue, []
        for job in left:
            job.tell(job, Ended(SHUTTING_DOWN))

    def wait(self) -> bool:
        """Wait for work, or until there was none for so long that cold runs may begin. False once the session is
        closed."""
        with self.changed:
            while not (self.closed or self.queue or self.batch.has_work):
                rest = self.worked + RESTED - time.monotonic() if self.batch.cold else None
                if rest is not None and rest <= 0:
                    break
                self.changed.wait(rest)
            return not self.closed

    def sort_out(self) -> None:
        """Take cancelled jobs out, and give free slots to waiting ones."""
        for job in [job for job in self.batch.jobs if job.cancelled]:
            self.batch.leave(job)
        with self.changed:
            self.queue = [job for job in self.queue if not job.cancelled]
            while self.queue and self.batch.slots.free:
                job = min(self.queue, key=self.rank)
                self.queue.remove(job)
                self.batch.enter(job)

    def rank(self, job: Job) -> tuple[int, int]:
        """A job's place in the queue: clients with fewer jobs in the batch go first, then the order of arrival."""
        return sum(other.client == job.client for other in self.batch.jobs), job.order

    def fail(self, error: EngineError) -> None:
        """End all jobs of the batch with `error`, and forget what the cache holds."""
        jobs = self.batch.jobs
        self.batch.reset()
        for job in jobs:
            job.tell(job, error)
