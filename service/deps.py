"""What routes ask for: `Annotated` aliases, so that a route says only what it does."""

from dataclasses import dataclass
from typing import Annotated

import redis.asyncio
from fastapi import Depends, Header, Query, Request
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter

from registry.datasets import Datasets
from registry.events import connect_async
from registry.keys import Keys
from registry.queue import Queue, make_celery
from registry.repository import Repository, connect
from registry.settings import Settings
from registry.store import ArtifactStore


@dataclass(frozen=True)
class State:
    """What the processes of the service share with the workers."""

    settings: Settings
    repository: Repository
    events: "redis.asyncio.Redis"
    store: ArtifactStore
    queue: Queue
    keys: Keys
    limiter: MovingWindowRateLimiter

    @property
    def datasets(self) -> Datasets:
        return Datasets(self.store)

    @classmethod
    def start(cls, settings: Settings) -> "State":
        client = connect(settings.resolved_redis_url)
        return cls(
            settings=settings,
            repository=Repository(client, settings.image_ttl_seconds),
            events=connect_async(settings.resolved_redis_url),
            store=ArtifactStore(settings.resolved_store_dir),
            queue=Queue(make_celery(settings), client),
            keys=Keys(settings.resolved_keys_file),
            limiter=MovingWindowRateLimiter(_counters(settings.resolved_redis_url)),
        )


def _counters(redis_url: str) -> RedisStorage:
    """Where calls are counted, for all processes of the service together."""
    url = f"redis+{redis_url}" if redis_url.startswith("unix:") else redis_url
    return RedisStorage(url, socket_timeout=10, socket_connect_timeout=3)


async def _state(request: Request) -> State:
    state = request.app.state.fineserve
    assert isinstance(state, State)
    return state


StateDep = Annotated[State, Depends(_state)]


IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=200)]
LastEventId = Annotated[str, Header(alias="Last-Event-ID", pattern=r"^\d{1,18}(-\d{1,18})?$")]
Offset = Annotated[int, Query(ge=0, le=10**9)]
Limit = Annotated[int, Query(ge=1, le=200)]
