"""From the session's thread to one HTTP request: updates in an event loop, ended when the client goes away."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as Http

from lowbit.engine.request import Request
from lowbit.errors import EngineError
from lowbit.serve.job import Constraint, Job, Update
from lowbit.serve.session import Session

T = TypeVar("T")
QUIET = 10.0  # seconds without an update after which a stream says that it is alive: proxies close silent connections


class Gone(Exception):
    """The client closed the connection."""


class Flow:
    """The jobs of one HTTP request."""

    def __init__(
        self, session: Session, requests: Sequence[Request], client: str, grammars: Sequence[Constraint | None]
    ) -> None:
        self.session, self.loop = session, asyncio.get_running_loop()
        self.arrived: asyncio.Queue[tuple[Job, Update | EngineError]] = asyncio.Queue()
        self.jobs = session.submit(requests, self.tell, client, grammars)

    def tell(self, job: Job, update: Update | EngineError) -> None:
        """Pass an update on, from the session's thread."""
        try:
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, (job, update))
        except RuntimeError:  # the loop has ended, and nobody reads
            job.cancelled = True

    async def updates(self) -> AsyncGenerator[tuple[Job, Update] | None, None]:
        """Every update of every job, as they come, and None after each QUIET seconds without one. Jobs that are not
        finished at the end are cancelled."""
        left = len(self.jobs)
        try:
            while left:
                try:
                    async with asyncio.timeout(QUIET):
                        job, update = await self.arrived.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(update, EngineError):
                    raise update
                left -= update.piece.finish_reason is not None
                yield job, update
        finally:
            self.session.cancel(self.jobs)


async def unless_gone(http: Http, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection: then Gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()


async def disconnected(http: Http) -> None:
    """Return once the client has closed the connection. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
