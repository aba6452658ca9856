"""Drafts by prompt lookup for a greedy request that writes alone: see engine/lookup.py."""

from collections.abc import Sequence

from lowbit.engine.lookup import Index, lookup_step
from lowbit.engine.workspace import Workspace
from lowbit.serve.job import Job


class Drafts:
    """Steps with at most `most` draft tokens; 0 for none."""

    def __init__(self, space: Workspace, most: int) -> None:
        self.space, self.most = space, most
        self.index = Index(())
        self.job: Job | None = None

    def suit(self, jobs: Sequence[Job]) -> bool:
        """True for one job whose drafts can be checked: it is greedy, without penalties, logprobs and grammar."""
        if not self.most or len(jobs) != 1:
            return False
        sampling = jobs[0].request.sampling
        plain = not sampling.temperature and not sampling.penalized and sampling.logprobs is None
        return plain and jobs[0].grammar is None

    def step(self, job: Job, start: int) -> list[int]:
        """The next tokens of a job, whose sequence has its position 0 in the cache slot `start`."""
        request = job.request
        if self.job is not job:
            self.index, self.job = Index(()), job
        self.index.extend(request.sequence[len(self.index.tokens) :])
        assert self.space.cache is not None
        batch, length = self.space.cache.batch, job.length
        single, several = (self.space.runner(rows, batch, length) for rows in (1, 1 + self.most))
        reach = request.short if request.short is not None and request.before_turn else self.space.cache.context
        return lookup_step(single, several, self.index, start, reach)
