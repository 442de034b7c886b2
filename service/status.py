"""State of the service: whether it is ready, and snapshots for those who watch it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import structlog
from fastapi.concurrency import run_in_threadpool
from redis import RedisError, ResponseError

from fineserve.wire import CallerResponse, ModelResponse, Snapshot, Status, WorkerResponse
from registry.keys import ApiKey
from registry.queue import BUILD_QUEUE, SAMPLE_QUEUE
from registry.records import FamilyRecord, WorkerRecord
from service.access import Caller
from service.deps import State
from service.planning import missing_profiles, profiles
from service.submission import storage_shortage

log = structlog.get_logger()

WORKER_QUEUES = (BUILD_QUEUE, SAMPLE_QUEUE)
SNAPSHOT_SECONDS = 1.0
SNAPSHOT_MODELS = 50


def missing(state: State) -> list[str]:
    """Requirements for images that are not met; empty when the service is ready."""
    try:
        state.repository.try_to_write()
        return _missing(state, state.repository.families(), state.repository.expected_workers())
    except ResponseError as error:
        return [f"Redis, which refuses to work ({error})"]
    except RedisError as error:  # it may name the address, which is nobody's business
        log.warning("Redis cannot be reached", error=str(error))
        return ["Redis, which cannot be reached"]


def _missing(
    state: State, families: Sequence[FamilyRecord], workers: Sequence[WorkerRecord]
) -> list[str]:
    shortage, queues = storage_shortage(state), {worker.queue for worker in workers}
    return [
        *([f"room for artifacts: {shortage}"] if shortage else []),
        *(f"a worker for the queue {queue!r}" for queue in WORKER_QUEUES if queue not in queues),
        *([] if families else ["a family"]),
        *(
            f"a device profile for {family} (estimated in seconds)"
            for family in missing_profiles(
                state.repository, families, workers, state.settings.default_family
            )
        ),
    ]


def waiting(state: State, workers: Sequence[WorkerRecord]) -> dict[str, int]:
    """Number of messages in each queue that no worker has taken, for any class of device."""
    device_classes = {worker.device_class for worker in workers}
    return {
        queue: sum(state.queue.length(queue, device_class) for device_class in device_classes)
        for queue in WORKER_QUEUES
    }


def status_for(state: State, caller: Caller) -> Status:
    return _told_to(caller, _status(state, caller.sees))


def _told_to(caller: Caller, status: Status) -> Status:
    key = caller.key
    described = key and CallerResponse(key=key.id, owner=key.owner, scopes=key.scopes)
    return status.model_copy(update={"caller": described})


def _status(state: State, owner: str | None) -> Status:
    """Status as all keys of an owner see it; None is those of operators."""
    repository = state.repository
    families, workers = repository.families(), repository.workers()
    expected = repository.expected_workers(workers)
    return Status(
        caller=None,
        missing=_missing(state, families, expected),
        families=[family.name for family in families],
        workers=[WorkerResponse.model_validate(worker) for worker in workers],
        profiles=profiles(repository, families),
        queues=waiting(state, expected),
        active_models=repository.models.count_active(),
        active_generations=repository.generations.count_active(),
        failures=repository.failures() if owner is None else [],
        redis_memory_bytes=repository.memory_bytes(),
        store_disk_free_bytes=state.store.free_bytes(),
        store_bytes=repository.store_bytes(),
    )


def _snapshot(state: State, owner: str | None) -> Snapshot:
    try:
        newest = state.repository.models.page(0, SNAPSHOT_MODELS, owner).items
        return Snapshot(
            status=_status(state, owner),
            models=[ModelResponse.model_validate(record) for record in newest],
            images=state.repository.images_made([record.id for record in newest]),
        )
    except RedisError as error:
        log.warning("Redis cannot be reached", error=str(error))
        return Snapshot(status=None, models=[], images={})


@dataclass
class _Look:
    """One look at the state of the service, for all keys of an owner."""

    begun: float
    snapshot: "asyncio.Future[Snapshot]"
    texts: dict[ApiKey | None, str] = field(default_factory=dict)

    async def text_for(self, caller: Caller) -> str:
        snapshot = await asyncio.shield(self.snapshot)  # others wait for it, too
        if caller.key not in self.texts:
            status = snapshot.status and _told_to(caller, snapshot.status)
            told = snapshot.model_copy(update={"status": status})
            self.texts[caller.key] = told.model_dump_json()
        return self.texts[caller.key]


class Snapshots:
    """Snapshots as JSON, each of which asks Redis for a score of things.

    However many watch, everybody who sees the same gets one that is made once in `seconds`.
    """

    def __init__(self, state: State, seconds: float = SNAPSHOT_SECONDS) -> None:
        self._state, self._seconds = state, seconds
        self._looks: dict[str | None, _Look] = {}

    async def watch(self, caller: Caller) -> AsyncIterator[str]:
        """Snapshots that differ from the one before, for as long as the caller's key is valid."""
        told = None
        while caller.key is None or self._state.keys.valid(caller.key):
            text = await self._look(caller.sees).text_for(caller)
            if text != told:
                yield text
            told = text
            await asyncio.sleep(self._seconds)

    def _look(self, owner: str | None) -> _Look:
        now = time.monotonic()
        self._looks = {
            whose: look
            for whose, look in self._looks.items()
            if not look.snapshot.done() or now - look.begun < self._seconds
        }
        if owner not in self._looks:
            snapshot = run_in_threadpool(_snapshot, self._state, owner)
            self._looks[owner] = _Look(now, asyncio.ensure_future(snapshot))
        return self._looks[owner]
