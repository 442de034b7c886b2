"""/models: models made from budgets."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from fineserve.wire import ExportFormat, ModelList, ModelRequest, ModelResponse
from registry.errors import RecordUnreadable
from registry.events import follow
from service.access import Anybody, Deployer, ModelDep, visible
from service.connection import while_connected
from service.deps import IdempotencyKey, LastEventId, Limit, Offset, StateDep
from service.exports import wait_for_export
from service.models import (
    accept_model,
    cancelled,
    continue_training,
    delete,
    delete_artifacts,
)
from service.streams import StreamDep, require_more

router = APIRouter(prefix="/models", tags=["models"])


@router.post("", status_code=202)
def create_model(
    request: ModelRequest,
    response: Response,
    state: StateDep,
    caller: Deployer,
    key: IdempotencyKey = None,
) -> ModelResponse:
    """Solve the budget and queue the model that fits."""
    stored = accept_model(state, request, key, caller)
    response.headers["Location"] = f"/models/{stored.id}"
    return ModelResponse.model_validate(stored)


@router.get("")
def list_models(
    state: StateDep, caller: Anybody, offset: Offset = 0, limit: Limit = 50
) -> ModelList:
    """The caller's models, newest first; deleted ones are left out."""
    page = state.repository.models.page(offset, limit, caller.sees)
    return ModelList(
        models=[ModelResponse.model_validate(record) for record in page.items],
        next_offset=page.next_offset,
    )


@router.get("/{model_id}")
def get_model(record: ModelDep, _: Anybody) -> ModelResponse:
    return ModelResponse.model_validate(record)


@router.delete("/{model_id}", status_code=204)
def delete_model(model_id: str, state: StateDep, caller: Deployer) -> None:
    """Stop its build if there is one, and remove what it stored."""
    try:
        delete(state, visible(state.repository.models.get(model_id), caller))
    except RecordUnreadable:  # whose it was cannot be told either
        if caller.sees is not None:
            raise
        state.repository.models.discard(model_id)
        delete_artifacts(state, model_id)


@router.post("/{model_id}/cancel")
def cancel_model(record: ModelDep, state: StateDep, _: Deployer) -> ModelResponse:
    """Stop a build between two steps. A model that is being refined keeps the best so far."""
    stopped = state.repository.models.decide(record.id, cancelled)
    return ModelResponse.model_validate(stopped)


@router.post("/{model_id}/continue", status_code=202)
def continue_model(record: ModelDep, state: StateDep, _: Deployer) -> ModelResponse:
    """Train a model on that was not trained enough, for as long again, from where it stopped."""
    return ModelResponse.model_validate(continue_training(state, record))


async def _more(record: ModelDep, state: StateDep, after: LastEventId = "0") -> None:
    await require_more(state, record, after)


@router.get(
    "/{model_id}/events",
    response_class=EventSourceResponse,
    dependencies=[Depends(_more)],
    responses={204: {"description": "There are no more events."}},
)
async def model_events(
    record: ModelDep,
    state: StateDep,
    stream: StreamDep,
    _: Anybody,
    after: LastEventId = "0",
) -> AsyncIterator[ServerSentEvent]:
    """Status changes and retraining loss, from the first to the last."""
    async for event in stream.of(follow(state.events, record, after)):
        yield ServerSentEvent(raw_data=event.data, event=event.name, id=event.id)


@router.get(
    "/{model_id}/export",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/x-tar": {}}},
        307: {"description": "It is at another address, which is good for five minutes."},
    },
)
async def export_model(
    connection: Request,
    record: ModelDep,
    state: StateDep,
    caller: Deployer,
    form: Annotated[ExportFormat, Query(alias="format")] = ExportFormat.DIFFUSERS,
) -> Response:
    """The revision that is served now as a tar of one directory.

    `diffusers` is loaded by plain diffusers and `onnx` run by ONNX runtimes, with every weight
    written out; `native` and `adapter` are loaded by `learngenes`, and hold U, V and Sigma, or
    Sigma alone. A worker makes it when it is first asked for; later answers are at once.
    """
    found = await while_connected(connection, wait_for_export(state, record.id, form, caller))
    if isinstance(found, str):
        return RedirectResponse(found, headers={"cache-control": "no-store"})
    return FileResponse(found, media_type="application/x-tar", filename=f"{record.id}.tar")
