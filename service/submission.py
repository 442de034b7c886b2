"""What accepting work has in common, whatever the work is."""

import structlog
from kombu.exceptions import OperationalError
from redis import RedisError

from registry.records import GenerationRecord, ModelRecord
from registry.settings import Settings
from service.deps import State
from service.problems import Problem, storage_full

log = structlog.get_logger()


MOST_MEMORY_SHARE = 0.9
"""Of Redis's: what is accepted already needs the rest."""


def submit(state: State, task: str, record: ModelRecord | GenerationRecord) -> None:
    """Enqueue a record that is already stored; a worker ignores what it has been told twice.

    When the broker cannot take the message the record waits, and the workers' housekeeping
    enqueues it: it has been accepted.
    """
    if record.status != "queued":
        return
    try:
        state.queue.enqueue(task, record.id, record.device_class)
    except (OperationalError, RedisError) as error:
        log.warning("left to housekeeping", record=record.id, error=str(error))


def no_room(state: State) -> str | None:
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


def require_room(state: State) -> None:
    """Raises Problem 507 when what is accepted now could not be stored."""
    if why := no_room(state):
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
                f"{name}={value} is over this server's limit of {most}",
                limit=most,
            )
