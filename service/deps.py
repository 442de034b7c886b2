"""What routes ask for: `Annotated` aliases, so that a route says only what it does."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

import redis.asyncio
from fastapi import Depends, Header, Query, Request

from registry.events import connect_async
from registry.queue import Queue, make_celery
from registry.records import GenerationRecord, ModelRecord
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

    @classmethod
    def start(cls, settings: Settings) -> "State":
        return cls(
            settings=settings,
            repository=Repository(connect(settings.resolved_redis_url), settings.image_ttl_seconds),
            events=connect_async(settings.resolved_redis_url),
            store=ArtifactStore(settings.resolved_store_dir),
            queue=Queue(make_celery(settings)),
        )

    def waiting(self, queue: str) -> int:
        """Messages of a queue that no worker has taken, for any class of device."""
        device_classes = {worker.device_class for worker in self.repository.workers()}
        return sum(self.queue.length(queue, device_class) for device_class in device_classes)


async def _state(request: Request) -> State:
    state = request.app.state.fineserve
    assert isinstance(state, State)
    return state


StateDep = Annotated[State, Depends(_state)]


def _model(model_id: str, state: StateDep) -> ModelRecord:
    return state.repository.models.get(model_id)


def _generation(generation_id: str, state: StateDep) -> GenerationRecord:
    return state.repository.generations.get(generation_id)


async def _owner(authorization: Annotated[str, Header()] = "") -> str:
    """Nobody is authenticated yet: whoever sends the same key shares a place in the queue."""
    return hashlib.sha256(authorization.encode()).hexdigest()[:16] if authorization else ""


OwnerDep = Annotated[str, Depends(_owner)]
ModelDep = Annotated[ModelRecord, Depends(_model)]
GenerationDep = Annotated[GenerationRecord, Depends(_generation)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=200)]
LastEventId = Annotated[str, Header(alias="Last-Event-ID", pattern=r"^\d{1,18}(-\d{1,18})?$")]
Offset = Annotated[int, Query(ge=0, le=10**9)]
Limit = Annotated[int, Query(ge=1, le=200)]
