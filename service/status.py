"""/families, /healthz and /readyz."""

import redis
from fastapi import APIRouter, Response

from registry.queue import BUILD_QUEUE, SAMPLE_QUEUE
from registry.records import FamilyRecord
from service.deps import StateDep
from service.problems import Problem
from service.schemas import FamilyList, Readiness
from service.sizing import missing_profiles

router = APIRouter(tags=["status"])


@router.get("/families")
def list_families(state: StateDep) -> FamilyList:
    """What the workers hold."""
    return FamilyList(families=state.repository.families())


@router.get("/families/{name}")
def get_family(name: str, state: StateDep) -> FamilyRecord:
    for family in state.repository.families():
        if family.name == name:
            return family
    raise Problem(404, "not-found", f"no family {name!r}; GET /families lists them")


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(response: Response, state: StateDep) -> Readiness:
    """Whether a budget sent now would become images; 503 and what is missing if not."""
    missing = []
    try:
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
    response.status_code = 503 if missing else 200
    return Readiness(ready=not missing, missing=missing)
