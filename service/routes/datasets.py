"""/tasks: images of other classes, that models can be retrained on."""

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from safetensors.numpy import save

from fineserve.wire import NAME, TaskList, TaskResponse, Text
from registry.datasets import IMAGES_FILE, SHEET_FILE, Dataset
from registry.errors import RecordNotFound
from service.access import Anybody, Caller, DatasetDep, Deployer
from service.deps import State, StateDep
from service.planning import choose_family
from service.problems import Problem
from service.submission import require_storage
from service.uploads.archives import Upload, UploadError, UploadLimits, preview, read_upload

router = APIRouter(prefix="/tasks", tags=["tasks"])

MOST_UPLOADS = 4
"""At a time: each is kept until it has been read, and who waits to be read holds a thread."""
MOST_READ_AT_ONCE = 2
BUSY_SECONDS = 10
_uploading = threading.BoundedSemaphore(MOST_UPLOADS)
_reading = threading.BoundedSemaphore(MOST_READ_AT_ONCE)
_keeping = threading.Lock()
IN_MEMORY_BYTES = 8_000_000
"""A larger upload waits in a temporary file, on the store's disk, which is watched."""
ARCHIVES = {
    kind: {"schema": {"type": "string", "format": "binary"}}
    for kind in ("application/zip", "application/x-tar", "application/gzip")
}


@router.post(
    "",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": ARCHIVES}},
)
async def create_task(
    connection: Request,
    response: Response,
    state: StateDep,
    caller: Deployer,
    name: Annotated[str | None, Query(pattern=NAME)] = None,
    family: Annotated[Text | None, Query()] = None,
) -> TaskResponse:
    """The body is a zip or tar of images, in folders that are named after their classes, or of what
    `save_to_disk` of Hugging Face datasets has written, with an Image and a ClassLabel column.

    The same images sent twice by one owner, under one name, are one task.
    """
    await run_in_threadpool(require_storage, state)
    with (
        _one_of_few(),
        tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, dir=str(state.store.root)) as file,
    ):
        sha256 = await _received(connection, file, state.settings.max_upload_mb)
        dataset = await run_in_threadpool(_store, state, caller, name, family, file, sha256)
    response.headers["Location"] = f"/tasks/{dataset.id}"
    return TaskResponse.model_validate(dataset)


@contextlib.contextmanager
def _one_of_few() -> Iterator[None]:
    if not _uploading.acquire(blocking=False):
        raise Problem(
            429,
            "too-many-uploads",
            f"{MOST_UPLOADS} uploads are under way; send this one again when one has ended",
            headers={"Retry-After": str(BUSY_SECONDS)},
        )
    try:
        yield
    finally:
        _uploading.release()


async def _received(connection: Request, file: IO[bytes], most_mb: float) -> str:
    """The body is in `file`; its SHA-256. Raises Problem 413."""
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


def _store(
    state: State, caller: Caller, name: str | None, family: str | None, file: IO[bytes], sha256: str
) -> Dataset:
    record, settings = choose_family(state, family), state.settings
    of_whom = "\n".join((caller.owner, name or "", record.name, sha256))
    dataset_id = f"t-{hashlib.sha256(of_whom.encode()).hexdigest()[:16]}"
    if known := _known(state, caller, dataset_id):
        return known
    network = record.network
    limits = UploadLimits(
        unpacked_bytes=int(settings.max_unpacked_mb * 1e6),
        images=settings.max_task_images,
        classes=settings.max_task_classes,
        scaled_bytes=int(settings.max_task_mb * 1e6),
    )
    try:
        with _reading:
            upload = read_upload(file, limits, network.image_channels, network.image_size)
    except UploadError as error:
        raise Problem(422, "unusable-upload", str(error)) from error
    dataset = Dataset(
        id=dataset_id,
        owner=caller.owner,
        name=name or f"{len(upload.class_names)} classes",
        family=record.name,
        class_names=upload.class_names,
        counts=np.bincount(upload.labels).tolist(),
    )
    with _keeping:
        # others came in while this one was read
        return _known(state, caller, dataset_id) or _kept(state, upload, dataset)


def _known(state: State, caller: Caller, dataset_id: str) -> Dataset | None:
    """The task if it is there already. Raises Problem 409 when there may be no other."""
    with contextlib.suppress(RecordNotFound):
        return state.datasets.get(dataset_id)
    most, there = state.settings.max_tasks, len(state.datasets.of(caller.owner))
    if there >= most:
        raise Problem(
            409,
            "too-many-tasks",
            f"there are {there} tasks of yours, as many as may be; delete one first",
            limit=most,
        )
    return None


def _kept(state: State, upload: Upload, dataset: Dataset) -> Dataset:
    images = {"images": upload.images, "labels": upload.labels}
    state.datasets.put(dataset, {IMAGES_FILE: save(images), SHEET_FILE: preview(upload)})
    return dataset


@router.get("")
def list_tasks(state: StateDep, caller: Anybody) -> TaskList:
    """Newest first."""
    return TaskList(
        tasks=[TaskResponse.model_validate(dataset) for dataset in state.datasets.of(caller.sees)]
    )


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
    """Models that were made for it stay; one that has yet to read its images fails."""
    state.datasets.delete(dataset.id)
