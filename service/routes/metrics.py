"""/metrics: counts of every process on this host, and gauges of Redis and the store."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.access import Operator
from service.metrics import Scrapes

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, _: Operator) -> Response:
    scrapes: Scrapes = request.app.state.scrapes
    return Response(scrapes.text(), media_type=CONTENT_TYPE_LATEST)
