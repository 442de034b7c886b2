"""/models: from a budget to a model."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from kombu.exceptions import OperationalError

from fineserve.wire import DEFAULT_TASK, ModelList, ModelRequest, ModelResponse, Refinement
from registry.datasets import Dataset
from registry.errors import ArtifactError
from registry.exports import EXPORT_FILE, ExportFormat, export_name
from registry.queue import BUILD_TASK, EXPORT_TASK, SAMPLE_QUEUE
from registry.records import ModelRecord, ModelStatus
from registry.repository import Reason
from registry.store import revision_name
from service.access import Anybody, Caller, Deployer, ModelDep, visible
from service.deps import IdempotencyKey, LastEventId, Limit, Offset, State, StateDep
from service.planning import choose_site, solve_budget
from service.problems import Problem, no_family, storage_full, unavailable
from service.streams import events
from service.submission import require_room, submit

router = APIRouter(prefix="/models", tags=["models"])

EXPORT_POLL_SECONDS = 0.1


@router.post("", status_code=202)
def create_model(
    request: ModelRequest,
    response: Response,
    state: StateDep,
    caller: Deployer,
    key: IdempotencyKey = None,
) -> ModelResponse:
    """Solve the budget and queue the model that fits."""
    models, body = state.repository.models, request.model_dump_json()
    stored = models.replay(caller.owner, key, body) or models.create(
        _new_model(state, request, caller),
        key,
        body,
        caller.room(state.settings.max_active_models),
    )
    submit(state, BUILD_TASK, stored)
    response.headers["Location"] = f"/models/{stored.id}"
    return ModelResponse.model_validate(stored)


def _dataset(state: State, request: ModelRequest, caller: Caller) -> Dataset | None:
    """Raises Problem."""
    if request.task == DEFAULT_TASK:
        return None
    dataset = visible(state.datasets.get(request.task), caller)
    if request.family not in (None, dataset.family):
        raise Problem(
            422,
            "other-family",
            f"task {dataset.id} is for the family {dataset.family}; leave family out, or "
            f"upload its images for {request.family}",
        )
    return dataset


def _new_model(state: State, request: ModelRequest, caller: Caller) -> ModelRecord:
    require_room(state)
    dataset = _dataset(state, request, caller)
    if dataset is not None:
        request = request.model_copy(update={"family": dataset.family})
    site = choose_site(state, request, live=True)
    class_names = None if dataset is None else dataset.class_names
    solution = solve_budget(state, request, site, len(class_names) if class_names else None)
    model_id = ModelRecord.new_id()
    return ModelRecord(
        id=model_id,
        owner=caller.owner,
        name=request.name or f"{dataset.name if dataset else site.family.name} {model_id}",
        family=site.family.name,
        device_class=site.profile.device_class,
        task=request.task,
        class_names=class_names,
        budget=request.budget,
        refine=request.refine and Refinement(max_seconds=request.refine.max_seconds),
        plan=solution.plan,
    )


@router.get("")
def list_models(
    state: StateDep, caller: Anybody, offset: Offset = 0, limit: Limit = 50
) -> ModelList:
    """Newest first; deleted ones are left out."""
    page = state.repository.models.page(offset, limit, caller.sees)
    return ModelList(
        models=[ModelResponse.model_validate(record) for record in page.items],
        next_offset=page.next_offset,
    )


@router.get("/{model_id}")
def get_model(record: ModelDep, _: Anybody) -> ModelResponse:
    return ModelResponse.model_validate(record)


@router.delete("/{model_id}", status_code=204)
def delete_model(record: ModelDep, state: StateDep, _: Deployer) -> None:
    """Stop its build if there is one, and remove what it stored."""
    if record.status != ModelStatus.DELETED:
        state.repository.models.change(record.id, status=ModelStatus.DELETED)
    for kind in ("models", "exports"):
        state.store.delete(f"{kind}/{record.id}")


@router.post("/{model_id}/cancel")
def cancel_model(record: ModelDep, state: StateDep, _: Deployer) -> ModelResponse:
    """Stop a build between two steps. A model that is being refined keeps the best so far."""

    def cancelled(current: ModelRecord) -> dict[str, object]:
        if current.refine is not None and current.refinement_begun:
            return {"refine": current.refine.model_copy(update={"stopped": True})}
        return {"status": ModelStatus.CANCELLED}

    return ModelResponse.model_validate(state.repository.models.decide(record.id, cancelled))


@router.get("/{model_id}/events", response_class=EventSourceResponse)
async def model_events(
    record: ModelDep, state: StateDep, _: Anybody, after: LastEventId = "0"
) -> AsyncIterator[ServerSentEvent]:
    """Status changes and retraining loss, from the first to the last."""
    async for event in events(state, record, after):
        yield event


@router.get(
    "/{model_id}/export",
    response_class=FileResponse,
    responses={200: {"content": {"application/x-tar": {}}}},
)
async def export_model(
    record: ModelDep,
    state: StateDep,
    caller: Deployer,
    form: Annotated[ExportFormat, Query(alias="format")] = ExportFormat.DIFFUSERS,
) -> FileResponse:
    """The revision that is served now as a tar of one directory.

    `diffusers` is loaded by plain diffusers and `onnx` run by ONNX runtimes, with every weight
    written out; `native` and `adapter` are loaded by `learngenes`, and hold U, V and Sigma, or
    Sigma alone. A worker makes it when it is first asked for; later answers are at once.
    """
    model_id = record.id
    deadline = time.monotonic() + state.settings.wait_seconds
    asked = ""
    while True:
        record = await run_in_threadpool(require_servable, state, model_id, caller)
        assert record.revision is not None
        name = export_name(model_id, record.revision, form)
        path = state.store.path(name, EXPORT_FILE)
        if path is not None:
            return FileResponse(path, media_type="application/x-tar", filename=f"{model_id}.tar")
        if reason := await run_in_threadpool(state.repository.failure_of, name):
            raise _export_failed(model_id, reason)
        if asked != name:  # by now another revision may be served
            await run_in_threadpool(_ask_for_export, state, record, record.revision, form)
            asked = name
        if time.monotonic() > deadline:
            raise unavailable(
                f"no worker has exported {model_id} yet; ask again, and see the log of the "
                "sampling worker if it lasts",
                "not-exported",
            )
        await asyncio.sleep(EXPORT_POLL_SECONDS)


def _export_failed(model_id: str, reason: Reason) -> Problem:
    if reason.problem == "storage-full":
        return storage_full(f"there was no room to export {model_id}")
    return Problem(
        500,
        "export-failed",
        f"{model_id} could not be exported: {reason.error}. The model is as it was; try another "
        "format, and see the log of the sampling worker",
    )


def _ask_for_export(state: State, record: ModelRecord, revision: int, form: ExportFormat) -> None:
    """Once, however many wait for it."""
    require_room(state)
    require_worker(state, record)
    _require_exportable(state, record, revision)
    name = export_name(record.id, revision, form)
    if state.repository.once(name, state.settings.wait_seconds):
        try:
            state.queue.enqueue(EXPORT_TASK, record.id, record.device_class, form)
        except OperationalError as error:
            raise unavailable("Redis cannot be reached; ask again shortly") from error


def _require_exportable(state: State, record: ModelRecord, revision: int) -> None:
    """Else the answer would be waited for in vain."""
    family = state.repository.family(record.family)
    if family is None:
        raise no_family(record.family)
    try:
        name = revision_name(record.id, revision)
        state.store.require_family(name, family.name, family.fingerprint)
    except ArtifactError as error:
        raise Problem(410, "model-gone", str(error)) from error


def require_worker(state: State, model: ModelRecord) -> None:
    """Raises Problem when all workers that sample are of another class of device.

    Where there is none at all one may be starting, and what is accepted waits for it.
    """
    classes = {w.device_class for w in state.repository.workers() if w.queue == SAMPLE_QUEUE}
    if classes and model.device_class not in classes:
        raise unavailable(
            f"model {model.id} was made for {model.device_class}, and workers sample on "
            f"{', '.join(sorted(classes))} only: start one there, or make the model again here",
            "no-worker",
        )


def require_servable(state: State, model_id: str, caller: Caller) -> ModelRecord:
    """The caller's model, if images can be sampled from it now."""
    record = visible(state.repository.models.get(model_id), caller)
    if record.servable:
        return record
    if record.status == ModelStatus.DELETED:
        raise Problem(410, "model-deleted", f"model {model_id} was deleted; make another one")
    if record.finished:
        raise Problem(
            409,
            f"model-{record.status}",
            f"model {model_id} {record.status}: {record.error or 'on request'}; make another one",
        )
    raise Problem(
        409,
        "model-not-ready",
        f"model {model_id} is {record.status}; follow /models/{model_id}/events and try again "
        "when its revision is 0 or more",
        headers={"Retry-After": "2"},
    )
