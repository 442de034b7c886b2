"""Dependencies of routes: `Annotated` aliases, so that a route says only what it does."""

from typing import Annotated

from fastapi import Depends, Header, Query, Request
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter

from registry.datasets import Datasets
from registry.events import connect_async
from registry.keys import Keys
from registry.queue import Queue, make_celery
from registry.repository import TIMEOUTS, Repository, connect
from registry.sessions import KeysMade, Sessions
from registry.settings import Settings
from registry.store import open_store


class State:
    """Settings, records, store and queue, which the service shares with the workers."""

    def __init__(self, settings: Settings) -> None:
        client = connect(settings.resolved_redis_url)
        pool = settings.redis_address.connect(**TIMEOUTS).connection_pool
        counts = RedisStorage("redis://", connection_pool=pool)  # to wherever that leads
        self.settings = settings
        self.repository = Repository(
            client, settings.image_ttl_seconds, workers_on_demand=settings.workers_on_demand
        )
        self.events = connect_async(settings.resolved_redis_url)
        self.store = open_store(settings)
        self.datasets = Datasets(self.store)
        self.queue = Queue(make_celery(settings), client)
        self.keys = Keys(settings.resolved_keys_file, settings.require_keys, KeysMade(client))
        self.sessions = Sessions(client, settings.session_seconds)
        self.limiter = MovingWindowRateLimiter(counts)


async def _state(request: Request) -> State:
    state = request.app.state.fineserve
    assert isinstance(state, State)
    return state


StateDep = Annotated[State, Depends(_state)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=200)]
LastEventId = Annotated[str, Header(alias="Last-Event-ID", pattern=r"^\d{1,18}(-\d{1,18})?$")]
Offset = Annotated[int, Query(ge=0, le=10**9)]
Limit = Annotated[int, Query(ge=1, le=200)]
