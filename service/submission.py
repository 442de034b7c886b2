"""What accepting work has in common, whatever the work is."""

from collections.abc import Callable
from typing import TypeVar

import structlog
from kombu.exceptions import OperationalError
from pydantic import BaseModel
from redis import RedisError

from registry.lifecycle import Records
from registry.records import GenerationRecord, ModelRecord
from registry.settings import Settings
from service.access import Caller
from service.deps import State
from service.problems import Problem, storage_full

log = structlog.get_logger()

Work = TypeVar("Work", ModelRecord, GenerationRecord)

MOST_MEMORY_SHARE = 0.9
"""Share of Redis's memory that may be in use: what is accepted already needs the rest."""


def accept(
    state: State,
    caller: Caller,
    request: BaseModel,
    key: str | None,
    make: Callable[[], Work],
    *,
    records: Records[Work],
    most_active: int,
    task: str,
) -> Work:
    """The record of a request, stored and enqueued: what `make` returns, or what the same request
    with the same Idempotency-Key has made before.

    Raises QueueFull, IdempotencyConflict, Problem. A place in the queue is looked for first: it
    is the cheapest refusal, and there are many of them when there is much to do.
    """
    body, room = request.model_dump_json(), caller.room(most_active)
    record = records.replay(caller.owner, key, body)
    if record is None:
        records.require_room(caller.owner, room)
        require_storage(state)
        record = records.create(make(), key, body, room)
    if record.status == "queued":
        _enqueue(state, task, record)
    return record


def _enqueue(state: State, task: str, record: ModelRecord | GenerationRecord) -> None:
    """A worker ignores what it has been told twice.

    When the broker cannot take the message the record waits, and the workers' housekeeping
    enqueues it: it has been accepted.
    """
    try:
        state.queue.enqueue(task, record.id, record.device_class)
    except (OperationalError, RedisError) as error:
        log.warning("left to housekeeping", record=record.id, error=str(error))


def storage_shortage(state: State) -> str | None:
    """Why what is accepted now could not be stored."""
    settings = state.settings
    if state.repository.memory_share() > MOST_MEMORY_SHARE:
        return "Redis is full"
    if state.store.free_bytes() < settings.min_free_disk_gb * 1e9:
        return "the disk of the artifacts is full"
    if settings.max_store_gb is not None:
        used_bytes = sum(state.repository.store_bytes().values())
        if used_bytes > settings.max_store_gb * 1e9:
            return f"the artifacts take {used_bytes / 1e9:.2f} GB of {settings.max_store_gb} GB"
    return None


def require_storage(state: State) -> None:
    """Raises Problem 507 when what is accepted now could not be stored."""
    if why := storage_shortage(state):
        raise storage_full(why)


def check_limits(settings: Settings, n: int, num_inference_steps: int) -> None:
    """Raises Problem 422 when a request is larger than this server allows."""
    for name, value, most in (
        ("n", n, settings.max_images_per_request),
        ("num_inference_steps", num_inference_steps, settings.max_inference_steps),
    ):
        if value > most:
            raise Problem(
                422,
                "over-limit",
                f"{name}={value} is over this server's limit of {most}; send less",
                limit=most,
            )
