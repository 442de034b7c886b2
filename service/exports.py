"""Exports of a model, which a worker writes into the store when one is first asked for."""

import asyncio
import time
from pathlib import Path

from fastapi.concurrency import run_in_threadpool
from kombu.exceptions import OperationalError

from fineserve.wire import ExportFormat
from learngenes.config import Mode
from registry.errors import ArtifactError
from registry.queue import EXPORT_TASK
from registry.records import ModelRecord
from registry.repository import Reason
from registry.store import EXPORT_FILE, export_name, served_name
from service.access import Caller
from service.deps import State
from service.problems import Problem, storage_full, unavailable
from service.serving import require_family, require_servable, require_worker
from service.submission import require_storage

POLL_SECONDS = 0.1
ASK_AGAIN_SECONDS = 10.0
"""Seconds after which an export is asked for again: the worker that began it may have ended."""


async def wait_for_export(
    state: State, model_id: str, form: ExportFormat, caller: Caller
) -> Path | str:
    """Path of the export of the revision that is served now, or its address. Raises Problem."""
    deadline = time.monotonic() + state.settings.wait_seconds
    asked, ask_again_at = "", 0.0
    while True:
        record = await run_in_threadpool(require_servable, state, model_id, caller)
        name = export_name(record, form)
        found = await run_in_threadpool(_find, state, name)
        if found is not None:
            return found
        if reason := await run_in_threadpool(state.repository.failure_of, name):
            raise _failed(model_id, reason)
        if asked != name or time.monotonic() > ask_again_at:  # another revision may be served now
            await run_in_threadpool(_ask, state, record, form)
            asked, ask_again_at = name, time.monotonic() + ASK_AGAIN_SECONDS
        if time.monotonic() > deadline:
            raise unavailable(
                f"no worker has exported {model_id} yet; ask again, and see the log of the "
                "sampling worker if it lasts",
                "not-exported",
            )
        await asyncio.sleep(POLL_SECONDS)


def _find(state: State, name: str) -> Path | str | None:
    link = state.store.link(name, EXPORT_FILE) if state.settings.presigned_downloads else None
    return link or state.store.checked_path(name, EXPORT_FILE)


def _failed(model_id: str, reason: Reason) -> Problem:
    if reason.problem == "storage-full":
        return storage_full(f"there was no room to export {model_id}")
    return Problem(
        500,
        "export-failed",
        f"{model_id} could not be exported: {reason.error}. The model is as it was; try another "
        "format, and see the log of the sampling worker",
    )


def _ask(state: State, record: ModelRecord, form: ExportFormat) -> None:
    """Ask for an export once in ASK_AGAIN_SECONDS, however many wait for it.

    Raises Problem where the answer would be waited for in vain.
    """
    require_storage(state)
    require_worker(state, record)
    family = require_family(state, record)
    try:
        if record.plan.mode is not Mode.DENSE:  # imported layers outlive U and V
            state.store.require_family(served_name(record), family.name, family.fingerprint)
    except ArtifactError as error:
        raise Problem(410, "model-gone", str(error)) from error
    if state.repository.once(export_name(record, form), ASK_AGAIN_SECONDS):
        try:
            state.queue.enqueue(EXPORT_TASK, record.id, record.device_class, form)
        except OperationalError as error:
            raise unavailable("Redis cannot be reached; ask again shortly") from error
