"""Event streams: as many as one key may have, ended with the service, and told when all is said."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from registry.events import last_event
from registry.records import Record
from service.access import Caller, CallerDep
from service.deps import State, StateDep
from service.problems import NoContent, Problem

T = TypeVar("T")
LOOK_SECONDS = 2.0
"""Seconds after which a stream looks whether its key is still valid, and the service goes on."""
MOST_OF_KEY = 50
"""Streams that one key may have open, or one client where there are no keys."""


class Streams:
    """Open streams of one process, by key."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self, whose: str) -> Iterator[None]:
        """A place for a stream. Raises Problem 429."""
        if self._open[whose] >= MOST_OF_KEY:
            raise Problem(
                429,
                "too-many-streams",
                f"{MOST_OF_KEY} event streams of yours are open; close one, or ask /models and "
                "/generations instead",
                headers={"Retry-After": "10"},
            )
        self._open[whose] += 1
        try:
            yield
        finally:
            self._open[whose] -= 1
            if not self._open[whose]:
                del self._open[whose]


class Stream:
    """Stream of one caller, which has a place."""

    def __init__(self, streams: Streams, state: State, caller: Caller) -> None:
        self._streams, self._state, self._caller = streams, state, caller

    async def of(self, items: AsyncIterator[T]) -> AsyncIterator[T]:
        """`items`, while the service is not asked to stop, and the caller's key is valid."""
        stop = asyncio.create_task(self._streams.stopping.wait())
        upcoming: asyncio.Task[T] | None = None
        try:
            while self._may_go_on():
                upcoming = upcoming or asyncio.create_task(_next(items))
                await asyncio.wait(
                    {upcoming, stop}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if upcoming.done():
                    try:
                        item = upcoming.result()
                    except StopAsyncIteration:
                        return
                    upcoming = None
                    yield item
        finally:
            stop.cancel()
            if upcoming is not None:
                upcoming.cancel()

    def _may_go_on(self) -> bool:
        key = self._caller.key
        return not self._streams.stopping.is_set() and (key is None or self._state.keys.valid(key))


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)


async def _stream(connection: Request, state: StateDep, caller: CallerDep) -> AsyncIterator[Stream]:
    streams: Streams = connection.app.state.streams
    host = connection.client.host if connection.client else ""
    with streams.place(caller.key.id if caller.key else host):
        yield Stream(streams, state, caller)


StreamDep = Annotated[Stream, Depends(_stream)]


async def require_more(state: State, record: Record, after: str) -> None:
    """Raise NoContent where no event is going to come, by which browsers stay away.

    Raises Problem 422 where `after` is of no event that there was.
    """
    last = await last_event(state.events, record)
    if last is not None and _order(after) > _order(last):
        raise Problem(
            422,
            "unknown-event",
            f"Last-Event-ID {after} is later than every event of {record.id}; leave it out",
        )
    if record.finished and (last is None or _order(after) == _order(last)):
        raise NoContent


def _order(event_id: str) -> tuple[int, int]:
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0)
