"""Event streams: each record has one, replayed from its beginning and then followed."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import redis.asyncio

MAX_EVENTS = 2000
BLOCK_SECONDS = 5.0
MOST_FOLLOWERS = 20_000
"""Each has a connection of its own; redis-py's default is 100."""


@dataclass(frozen=True)
class Event:
    id: str
    name: str
    """`status`, `progress`, and of a model `replanned` and `verified`."""
    data: str
    """JSON."""


def stream_key(record_name: str, record_id: str) -> str:
    return f"fineserve:{record_name}:{record_id}:events"


async def follow(
    client: "redis.asyncio.Redis", stream: str, after: str = "0", *, live: bool = True
) -> AsyncIterator[Event]:
    """Events later than the id `after`; when `live`, for ever: the caller breaks off."""
    block = int(BLOCK_SECONDS * 1000) if live else None
    while True:
        answer = cast(list[Any], await client.xread({stream: after}, block=block))
        for _, entries in answer:
            for event_id, fields in entries:
                after = event_id
                yield Event(event_id, fields["event"], fields["data"])
        if not live:
            return


def connect_async(redis_url: str) -> "redis.asyncio.Redis":
    return redis.asyncio.Redis.from_url(
        redis_url,
        decode_responses=True,
        max_connections=MOST_FOLLOWERS,
        socket_timeout=BLOCK_SECONDS + 10,
        socket_connect_timeout=3,
        protocol=2,
    )
