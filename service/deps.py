"""Dependencies of routes: `Annotated` aliases, so that a route says only what it does."""

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
    """Settings, records, store and queue, which the service shares with the workers."""

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
        url = settings.resolved_redis_url
        client = connect(url)
        counts_url = f"redis+{url}" if url.startswith("unix:") else url  # as limits writes it
        counts = RedisStorage(counts_url, socket_timeout=10, socket_connect_timeout=3)
        return cls(
            settings=settings,
            repository=Repository(client, settings.image_ttl_seconds),
            events=connect_async(url),
            store=ArtifactStore(settings.resolved_store_dir),
            queue=Queue(make_celery(settings), client),
            keys=Keys(settings.resolved_keys_file),
            limiter=MovingWindowRateLimiter(counts),
        )


async def _state(request: Request) -> State:
    state = request.app.state.fineserve
    assert isinstance(state, State)
    return state


StateDep = Annotated[State, Depends(_state)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=200)]
LastEventId = Annotated[str, Header(alias="Last-Event-ID", pattern=r"^\d{1,18}(-\d{1,18})?$")]
Offset = Annotated[int, Query(ge=0, le=10**9)]
Limit = Annotated[int, Query(ge=1, le=200)]
