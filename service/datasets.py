"""Data sets, which callers call tasks, made from uploads."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import IO

import numpy as np
from safetensors.numpy import save

from learngenes.data.images import DataError
from registry.datasets import IMAGES_FILE, SHEET_FILE, Dataset
from registry.errors import RecordNotFound
from service.access import Caller
from service.deps import State
from service.planning import choose_family
from service.problems import Problem
from service.uploads import UploadLimits, preview, read_upload

MOST_UPLOADS = 4
"""Uploads at a time: each is kept until it has been read, and holds a thread while it waits."""
MOST_READ_AT_ONCE = 2
BUSY_SECONDS = 10
_uploading = threading.BoundedSemaphore(MOST_UPLOADS)
_reading = threading.BoundedSemaphore(MOST_READ_AT_ONCE)
_keeping = threading.Lock()


@contextlib.contextmanager
def one_of_few() -> Iterator[None]:
    """Hold a place among the uploads. Raises Problem 429 while there is none."""
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


def store_upload(
    state: State, caller: Caller, name: str | None, family: str | None, file: IO[bytes], sha256: str
) -> Dataset:
    """Data set of an upload, or the same one that was made of it before. Raises Problem."""
    record, settings = choose_family(state, family), state.settings
    of_whom = "\n".join((caller.owner, name or "", record.name, sha256))
    dataset_id = f"t-{hashlib.sha256(of_whom.encode()).hexdigest()[:16]}"
    if known := _known(state, caller, dataset_id):
        return known
    limits = UploadLimits(
        unpacked_bytes=int(settings.max_unpacked_mb * 1e6),
        images=settings.max_task_images,
        classes=settings.max_task_classes,
        scaled_bytes=int(settings.max_task_mb * 1e6),
    )
    try:
        with _reading:
            channels, side = record.network.image_channels, record.network.image_size
            upload = read_upload(file, limits, channels, side)
    except DataError as error:
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
        if known := _known(state, caller, dataset_id):  # others came in while this one was read
            return known
        images = {"images": upload.images, "labels": upload.labels}
        state.datasets.put(dataset, {IMAGES_FILE: save(images), SHEET_FILE: preview(upload)})
        return dataset


def _known(state: State, caller: Caller, dataset_id: str) -> Dataset | None:
    """Data set that is there already. Raises Problem 409 when there may be no other."""
    with contextlib.suppress(RecordNotFound):
        return state.datasets.get(dataset_id)
    most, there = state.settings.max_tasks, len(state.datasets.of(caller.owner))
    if there >= most:
        detail = f"there are {there} tasks of yours, as many as may be; delete one first"
        raise Problem(409, "too-many-tasks", detail, limit=most)
    return None
