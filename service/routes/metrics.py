"""/metrics: counts of every process on this host, and gauges of Redis and the store."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from registry.metrics import registry as counted
from service.access import Operator
from service.deps import StateDep
from service.metrics import Present

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
def metrics(state: StateDep, _: Operator) -> Response:
    present = CollectorRegistry()
    present.register(Present(state))
    body = generate_latest(present) + generate_latest(counted())
    return Response(body, media_type=CONTENT_TYPE_LATEST)
