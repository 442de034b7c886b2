"""A record's event stream as server-sent events."""

import json
from collections.abc import AsyncIterator

from fastapi.sse import ServerSentEvent

from registry.events import follow, stream_key
from registry.records import Record
from service.deps import State


async def events(state: State, record: Record, after: str) -> AsyncIterator[ServerSentEvent]:
    """Replay, then follow, until the record is finished."""
    stream = stream_key(record.NAME, record.id)
    async for event in follow(state.events, stream, after, live=not record.finished):
        yield ServerSentEvent(raw_data=event.data, event=event.name, id=event.id)
        if event.name == "status" and json.loads(event.data)["status"] in record.FINISHED:
            return
