"""/tasks: images of other classes, that models can be retrained on."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from fineserve.wire import NAME, TaskList, TaskResponse, Text
from registry.datasets import SHEET_FILE
from service.access import Anybody, DatasetDep, Deployer
from service.datasets import Uploads
from service.deps import StateDep

router = APIRouter(prefix="/tasks", tags=["tasks"])

ARCHIVES = {
    kind: {"schema": {"type": "string", "format": "binary"}}
    for kind in ("application/zip", "application/x-tar", "application/gzip")
}


@router.post(
    "",
    status_code=201,
    responses={200: {"model": TaskResponse, "description": "Of a dry run."}},
    openapi_extra={"requestBody": {"required": True, "content": ARCHIVES}},
)
async def create_task(
    connection: Request,
    response: Response,
    caller: Deployer,
    name: Annotated[str | None, Query(pattern=NAME)] = None,
    family: Annotated[Text | None, Query()] = None,
    dry_run: Annotated[bool, Query()] = False,
) -> TaskResponse:
    """Make a task of a zip or tar of images, in folders that are named after their classes.

    Classes are the folders of the first level, whatever folders are in them, and numbered by the
    alphabet, or as numbers where all of them are numbers. A file `fineserve-classes.json`, a JSON
    object, may give each folder's class another name; the classes are in its order then. The answer
    lists what was skipped, and why; with `dry_run=true` it is all that happens. `fineserve tasks
    create` makes such an archive of a folder, or of a dataset that Hugging Face `datasets` has
    saved. The same images sent twice by one owner, under one name, are one task.
    """
    uploads: Uploads = connection.app.state.uploads
    dataset = await uploads.make(connection, caller, name, family, dry_run=dry_run)
    if dry_run:
        response.status_code = 200
    else:
        response.headers["Location"] = f"/tasks/{dataset.id}"
    return TaskResponse.model_validate(dataset)


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
