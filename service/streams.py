"""A record's event stream, up to its end."""

import json
from collections.abc import AsyncIterator

from fastapi.sse import ServerSentEvent

from registry.events import Event, follow, stream_key
from registry.records import Record
from service.deps import State


async def until_finished(state: State, record: Record, after: str = "0") -> AsyncIterator[Event]:
    """Replay, then follow, until the record is finished."""
    stream = stream_key(record.NAME, record.id)
    async for event in follow(state.events, stream, after, live=not record.finished):
        yield event
        if event.name == "status" and json.loads(event.data)["status"] in record.FINISHED:
            return


async def server_sent(state: State, record: Record, after: str) -> AsyncIterator[ServerSentEvent]:
    async for event in until_finished(state, record, after):
        yield ServerSentEvent(raw_data=event.data, event=event.name, id=event.id)
