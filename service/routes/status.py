"""/families, /healthz, /readyz and /status."""

import asyncio
from collections.abc import AsyncIterator

import redis
import structlog
from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from fineserve.wire import (
    CallerResponse,
    FamilyList,
    FamilyResponse,
    ModelResponse,
    Readiness,
    Snapshot,
    Status,
    WorkerResponse,
)
from registry.keys import Scope
from registry.queue import BUILD_QUEUE, SAMPLE_QUEUE
from registry.records import FamilyRecord
from registry.store import PREVIEWS_FILE, family_name
from service.access import Anybody, Caller
from service.deps import State, StateDep
from service.planning import missing_profiles
from service.problems import Problem
from service.submission import no_room

log = structlog.get_logger()

router = APIRouter(tags=["status"])

SNAPSHOT_SECONDS = 1.0
SNAPSHOT_MODELS = 50


@router.get("/families")
def list_families(state: StateDep, _: Anybody) -> FamilyList:
    """What the workers hold."""
    return FamilyList(families=[_shown(family) for family in state.repository.families()])


@router.get("/families/{name}")
def get_family(name: str, state: StateDep, _: Anybody) -> FamilyResponse:
    return _shown(_family(state, name))


def _shown(family: FamilyRecord) -> FamilyResponse:
    return FamilyResponse.model_validate(family.model_dump(mode="json"))


def _family(state: State, name: str) -> FamilyRecord:
    for family in state.repository.families():
        if family.name == name:
            return family
    raise Problem(404, "not-found", f"no family {name!r}; GET /families lists them")


@router.get("/families/{name}/previews.png", response_class=Response)
def get_previews(name: str, state: StateDep, _: Anybody) -> Response:
    """What every size samples before retraining: a row each, by depth and then rank."""
    family = _family(state, name)
    sheet = state.store.read(family_name(family.fingerprint), PREVIEWS_FILE)
    return Response(sheet, media_type="image/png", headers={"Cache-Control": "max-age=3600"})


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"model": Readiness}})
def readyz(response: Response, state: StateDep) -> Readiness:
    """Whether a budget sent now would become images; 503 and what is missing if not."""
    missing = _missing(state)
    response.status_code = 503 if missing else 200
    return Readiness(ready=not missing, missing=missing)


@router.get("/status")
def get_status(state: StateDep, caller: Anybody) -> Status:
    """What an operator wants to know at a glance; of failures, with the scope `admin`."""
    return _status(state, caller)


def _status(state: State, caller: Caller) -> Status:
    repository = state.repository
    workers = repository.workers()
    key = caller.key
    return Status(
        caller=key and CallerResponse(key=key.id, owner=key.owner, scopes=key.scopes),
        missing=_missing(state),
        families=[family.name for family in repository.families()],
        workers=[WorkerResponse.model_validate(worker) for worker in workers],
        queues={queue: state.waiting(queue) for queue in (BUILD_QUEUE, SAMPLE_QUEUE)},
        active_models=repository.models.count_active(),
        active_generations=repository.generations.count_active(),
        failures=repository.failures() if caller.may(Scope.ADMIN) else [],
        redis_memory_bytes=repository.memory_bytes(),
        store_disk_free_bytes=state.store.free_bytes(),
        store_bytes=repository.store_bytes(),
    )


@router.get("/status/events", response_class=EventSourceResponse)
async def status_events(state: StateDep, caller: Anybody) -> AsyncIterator[ServerSentEvent]:
    """`snapshot` events: the status and the newest models, whenever they change."""
    told = None
    while caller.key is None or state.keys.valid(caller.key):
        try:
            snapshot = await run_in_threadpool(_snapshot, state, caller)
        except redis.RedisError as error:
            log.warning("Redis cannot be reached", error=str(error))
            snapshot = Snapshot(status=None, models=[], images={}).model_dump_json()
        if snapshot != told:
            yield ServerSentEvent(raw_data=snapshot, event="snapshot")
        told = snapshot
        await asyncio.sleep(SNAPSHOT_SECONDS)


def _snapshot(state: State, caller: Caller) -> str:
    newest = state.repository.models.page(0, SNAPSHOT_MODELS, caller.sees).items
    made = state.repository.images_made()
    return Snapshot(
        status=_status(state, caller),
        models=[ModelResponse.model_validate(record) for record in newest],
        images={record.id: made[record.id] for record in newest if record.id in made},
    ).model_dump_json()


def _missing(state: State) -> list[str]:
    missing: list[str] = []
    try:
        if why := no_room(state):
            missing.append(f"room for artifacts: {why}")
        queues = {worker.queue for worker in state.repository.workers()}
        missing += [
            f"a worker for the queue {queue!r}"
            for queue in (BUILD_QUEUE, SAMPLE_QUEUE)
            if queue not in queues
        ]
        if not state.repository.families():
            missing.append("a family")
        missing += [
            f"a device profile for {family} (measured in under a minute)"
            for family in missing_profiles(state.repository)
        ]
    except redis.RedisError as error:
        missing.append(f"Redis ({error})")
    return missing
