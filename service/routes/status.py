"""/healthz, /readyz and /status."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from fineserve.wire import Readiness, Status
from service.access import Anybody
from service.deps import StateDep
from service.status import Snapshots, missing, status_for
from service.streams import StreamDep

router = APIRouter(tags=["status"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"model": Readiness}})
def readyz(response: Response, state: StateDep) -> Readiness:
    """Whether a budget sent now would become images; 503 and what is missing if not."""
    lacking = missing(state)
    response.status_code = 503 if lacking else 200
    return Readiness(ready=not lacking, missing=lacking)


@router.get("/status")
def get_status(state: StateDep, caller: Anybody) -> Status:
    """State of the service at a glance; with the scope `admin`, failures too."""
    return status_for(state, caller)


@router.get("/status/events", response_class=EventSourceResponse)
async def status_events(
    connection: Request, caller: Anybody, stream: StreamDep
) -> AsyncIterator[ServerSentEvent]:
    """`snapshot` events: the status and the newest models, whenever they change."""
    snapshots: Snapshots = connection.app.state.snapshots
    async for snapshot in stream.of(snapshots.watch(caller)):
        yield ServerSentEvent(raw_data=snapshot, event="snapshot")
