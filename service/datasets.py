"""Data sets, which callers call tasks, made from uploads."""

import asyncio
import contextlib
import hashlib
from pathlib import Path

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from fineserve.wire import SkippedResponse
from learngenes.data.images import DataError
from registry.datasets import IMAGES_FILE, SHEET_FILE, Dataset
from registry.errors import RecordNotFound
from registry.records import FamilyRecord
from service.access import Caller
from service.connection import while_connected
from service.deps import State
from service.planning import choose_family
from service.problems import Problem
from service.submission import require_storage
from service.uploads.archives import UploadLimits
from service.uploads.readers import Read, Readers
from service.uploads.receiving import Receiving, received, too_large

FORM, FIELDS = "multipart/form-data", "application/x-www-form-urlencoded"
"""Content types of `curl -F`, and of `curl -d`, which leaves out ends of lines: archives suffer."""
MEND = "`curl --data-binary @FILE -H 'Content-Type: application/zip'`"


class Uploads:
    """Uploads of one process of the service."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._receiving = Receiving()
        self.readers = Readers(state.settings.upload_processor_seconds)
        self._keeping = asyncio.Lock()

    async def make(
        self,
        connection: Request,
        caller: Caller,
        name: str | None,
        family: str | None,
        *,
        dry_run: bool,
    ) -> Dataset:
        """Data set of a request's body, or the same one that was made of it before.

        In a dry run nothing is kept. Raises Problem; ClientDisconnect when the client has left.
        """
        state, settings = self._state, self._state.settings
        sent = connection.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent == FORM:
            detail = f"a form is no archive: send the zip or tar itself, {MEND}"
            raise Problem(415, "not-an-archive", detail)
        await run_in_threadpool(require_storage, state)
        record = await run_in_threadpool(choose_family, state, family)
        most_bytes = int(settings.max_upload_mb * 1e6)
        announced = int(connection.headers.get("content-length", most_bytes))
        if "content-length" in connection.headers and announced > most_bytes:
            raise too_large(most_bytes)
        room = state.store.free_bytes() - settings.min_free_disk_gb * 1e9
        with (
            self._receiving.place(caller.owner, announced, room),
            state.store.scratch() as folder,
        ):
            file = folder / "upload"
            with file.open("wb") as content:
                sha256 = await received(connection, content, most_bytes)
            of_whom = "\n".join((caller.owner, name or "", record.name, sha256))
            dataset_id = f"t-{hashlib.sha256(of_whom.encode()).hexdigest()[:16]}"
            if not dry_run and (known := await run_in_threadpool(self._known, caller, dataset_id)):
                return known
            try:
                read = await while_connected(connection, self._read(file, folder, caller, record))
            except DataError as error:
                hint = f"; if it is whole where it was, send it as it is: {MEND}"
                detail = f"{error}{hint if sent == FIELDS else ''}"
                raise Problem(422, "unusable-upload", detail) from error
            dataset = Dataset(
                id=dataset_id,
                owner=caller.owner,
                name=name or f"{len(read.class_names)} classes",
                family=record.name,
                class_names=read.class_names,
                counts=read.counts,
                skipped=[SkippedResponse(**some) for some in read.skipped],
            )
            if dry_run:
                return dataset
            async with self._keeping:
                return await run_in_threadpool(self._keep, caller, dataset, read)

    async def _read(self, file: Path, folder: Path, caller: Caller, family: FamilyRecord) -> Read:
        settings, network = self._state.settings, family.network
        limits = UploadLimits(
            unpacked_bytes=int(settings.max_unpacked_mb * 1e6),
            images=settings.max_task_images,
            classes=settings.max_task_classes,
            scaled_bytes=int(settings.max_task_mb * 1e6),
        )
        channels, side = network.image_channels, network.image_size
        return await self.readers.read(file, folder, caller.owner, limits, channels, side)

    def _keep(self, caller: Caller, dataset: Dataset, read: Read) -> Dataset:
        if known := self._known(caller, dataset.id):  # others came in while this one was read
            return known
        content = {
            IMAGES_FILE: read.images_file.read_bytes(),
            SHEET_FILE: read.preview_file.read_bytes(),
        }
        self._state.datasets.put(dataset, content)
        return dataset

    def _known(self, caller: Caller, dataset_id: str) -> Dataset | None:
        """Data set that is there already. Raises Problem 409 when there may be no other."""
        datasets, settings = self._state.datasets, self._state.settings
        with contextlib.suppress(RecordNotFound):
            return datasets.get(dataset_id)
        most, there = settings.max_tasks, len(datasets.of(caller.owner))
        if there >= most:
            detail = f"there are {there} tasks of yours, as many as may be; delete one first"
            raise Problem(409, "too-many-tasks", detail, limit=most)
        return None
