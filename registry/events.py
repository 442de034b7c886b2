"""Event streams: each record has one, which is replayed from its beginning and then followed."""

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, cast

import redis.asyncio

from registry.address import RedisAddress
from registry.records import Record

MAX_EVENTS = 2000
BLOCK_SECONDS = 5.0
MOST_FOLLOWERS = 20_000
"""Connections that may be open: each follower has its own, and redis-py's default is 100."""


class Event(NamedTuple):
    id: str
    name: str
    """`status`, `progress`, and for a model `replanned`, `verified` and `refined`."""
    data: str
    """Fields of the event, as JSON."""


def redis_key(*parts: str) -> str:
    return ":".join(("fineserve", *parts))


def stream_key(record_name: str, record_id: str) -> str:
    return redis_key(record_name, record_id, "events")


async def follow(
    client: "redis.asyncio.Redis", record: Record, after: str = "0"
) -> AsyncIterator[Event]:
    """Events later than the id `after`, until the record is finished."""
    stream = stream_key(record.NAME, record.id)
    block = None if record.finished else int(BLOCK_SECONDS * 1000)
    while True:
        answer = cast(list[Any], await client.xread({stream: after}, block=block))
        for _, entries in answer:
            for event_id, fields in entries:
                after = event_id
                event = Event(event_id, fields["event"], fields["data"])
                yield event
                if event.name == "status" and json.loads(event.data)["status"] in record.FINISHED:
                    return
        if record.finished:
            return


async def last_event(client: "redis.asyncio.Redis", record: Record) -> str | None:
    """Id of a record's newest event; None where its events have expired."""
    newest = await client.xrevrange(stream_key(record.NAME, record.id), count=1)
    return str(newest[0][0]) if newest else None


def connect_async(redis_url: str) -> "redis.asyncio.Redis":
    return RedisAddress.of(redis_url).connect_async(
        decode_responses=True,
        max_connections=MOST_FOLLOWERS,
        socket_timeout=BLOCK_SECONDS + 10,
        socket_connect_timeout=3,
        protocol=2,
    )
