"""Acceptance of work, whatever the work is."""

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

Asked = TypeVar("Asked", bound=BaseModel)
Work = TypeVar("Work", ModelRecord, GenerationRecord)

MOST_MEMORY_SHARE = 0.9
"""Share of Redis's memory that may be in use: accepted work needs the rest."""


def accept(
    state: State,
    caller: Caller,
    request: Asked,
    key: str | None,
    make: Callable[[State, Asked, Caller], Work],
    records: Records[Work],
    most_active: int,
    task: str,
) -> Work:
    """Record of a request, stored and enqueued: what `make` returns, or what the same request with
    the same Idempotency-Key has made before.

    Raises QueueFull, IdempotencyConflict, Problem. A place in the queue is looked for first: it
    is the cheapest refusal, and there are many of them when there is much to do.
    """
    body, room = request.model_dump_json(), caller.room(most_active)
    record = records.replay(caller.owner, key, body)
    if record is None:
        records.require_room(caller.owner, room)
        require_storage(state)
        record = records.create(make(state, request, caller), key, body, room)
    if record.status == "queued":
        enqueue(state, task, record)
    return record


def enqueue(state: State, task: str, record: ModelRecord | GenerationRecord) -> None:
    """Tell workers of a record; where that fails, housekeeping does it later."""
    try:  # a worker ignores what it has been told twice
        state.queue.enqueue(task, record.id, record.device_class)
    except (OperationalError, RedisError) as error:
        log.warning("a record is left to housekeeping", record=record.id, error=str(error))


def storage_shortage(state: State) -> str | None:
    """Reason why work that is accepted now could not be stored."""
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
    """Raise Problem 507 when work that is accepted now could not be stored."""
    if why := storage_shortage(state):
        raise storage_full(why)


def check_limits(settings: Settings, n: int, num_inference_steps: int) -> None:
    """Raise Problem 422 when a request is larger than this server allows."""
    for name, value, most in (
        ("n", n, settings.max_images_per_request),
        ("num_inference_steps", num_inference_steps, settings.max_inference_steps),
    ):
        if value > most:
            detail = f"{name}={value} is over this server's limit of {most}; send less"
            raise Problem(422, "over-limit", detail, limit=most, field=name)
