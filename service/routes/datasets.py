"""/tasks: images of other classes, that models can be retrained on."""

import hashlib
import tempfile
from typing import IO, Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from fineserve.wire import NAME, TaskList, TaskResponse, Text
from registry.datasets import SHEET_FILE
from service.access import Anybody, DatasetDep, Deployer
from service.datasets import one_of_few, store_upload
from service.deps import StateDep
from service.problems import Problem
from service.submission import require_storage

router = APIRouter(prefix="/tasks", tags=["tasks"])

IN_MEMORY_BYTES = 8_000_000
"""Bytes above which an upload waits in a file, on the store's disk, which is watched."""
ARCHIVES = {
    kind: {"schema": {"type": "string", "format": "binary"}}
    for kind in ("application/zip", "application/x-tar", "application/gzip")
}


@router.post(
    "", status_code=201, openapi_extra={"requestBody": {"required": True, "content": ARCHIVES}}
)
async def create_task(
    connection: Request,
    response: Response,
    state: StateDep,
    caller: Deployer,
    name: Annotated[str | None, Query(pattern=NAME)] = None,
    family: Annotated[Text | None, Query()] = None,
) -> TaskResponse:
    """Make a task of a zip or tar of images, in folders that are named after their classes.

    A file `fineserve-classes.json` in it, a JSON object, may give each folder's class another name;
    the classes are in its order then. `fineserve tasks create` makes such an archive of a dataset
    that Hugging Face `datasets` has saved. The same images sent twice by one owner, under one name,
    are one task.
    """
    await run_in_threadpool(require_storage, state)
    with (
        one_of_few(),
        tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, dir=str(state.store.root)) as file,
    ):
        sha256 = await _received(connection, file, state.settings.max_upload_mb)
        dataset = await run_in_threadpool(store_upload, state, caller, name, family, file, sha256)
    response.headers["Location"] = f"/tasks/{dataset.id}"
    return TaskResponse.model_validate(dataset)


async def _received(connection: Request, file: IO[bytes], most_mb: float) -> str:
    """SHA-256 of the body, which is then in `file`. Raises Problem 413."""
    digest = hashlib.sha256()
    async for chunk in connection.stream():
        digest.update(chunk)
        if file.tell() + len(chunk) > most_mb * 1e6:
            raise Problem(
                413,
                "upload-too-large",
                f"the upload has more than {most_mb} MB; send fewer or smaller images: they are "
                "scaled to the family's size anyway",
                limit=int(most_mb * 1e6),
            )
        file.write(chunk)
    file.seek(0)
    return digest.hexdigest()


@router.get("")
def list_tasks(state: StateDep, caller: Anybody) -> TaskList:
    """The caller's tasks, newest first."""
    seen = state.datasets.of(caller.sees)
    return TaskList(tasks=[TaskResponse.model_validate(dataset) for dataset in seen])


@router.get("/{task_id}")
def get_task(dataset: DatasetDep, _: Anybody) -> TaskResponse:
    return TaskResponse.model_validate(dataset)


@router.get("/{task_id}/preview.png", response_class=Response)
def get_preview(dataset: DatasetDep, state: StateDep, _: Anybody) -> Response:
    """Some images of each class, a row each, as a model will see them."""
    sheet = state.datasets.read(dataset.id, SHEET_FILE)
    return Response(sheet, media_type="image/png", headers={"Cache-Control": "max-age=3600"})


@router.delete("/{task_id}", status_code=204)
def delete_task(dataset: DatasetDep, state: StateDep, _: Deployer) -> None:
    """Delete a task: models made for it stay; one that has yet to read its images fails."""
    state.datasets.delete(dataset.id)
