"""Attempts at a record's work, each of which ends in a state that is true.

`attempts` in the record decides which of two workers may go on, and how often work is tried.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any, Generic

import redis
import structlog

from learngenes.training.tuning import Pause
from registry.errors import (
    DeadlineMissed,
    ModelGone,
    Refused,
    StorageFull,
    StoreAway,
    StoreRefuses,
    Superseded,
)
from registry.lifecycle import Records
from registry.records import REFUSED
from worker.leases import R, Stopping
from worker.runtime import Runtime

log = structlog.get_logger()

LONG_WAIT_SECONDS = 600.0
"""Seconds after which queued work is enqueued again even if the queue is not empty."""
PROBLEMS: dict[type[Exception], str] = {
    DeadlineMissed: "deadline-missed",
    ModelGone: "model-gone",
    Refused: REFUSED,
}
"""Kinds of failure that a caller is told."""


class GivingWay(Pause):
    """The work has had its turn while other work of its queue waits; it goes to the end of it."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.task = task


def attempt(
    runtime: Runtime, records: Records[R], record_id: str, work: Callable[[R], None]
) -> None:
    """Work on a record under a lease.

    Running it twice, or half and then again, does no harm. When Redis is away the error
    goes up and the record stays as it is, for housekeeping to find.
    """
    next_task: str | None = None
    with runtime.leases.claimed(records, record_id, runtime.settings.max_attempts) as record:
        if record is None:
            log.info("nothing to do", record=record_id)
            return
        try:
            work(record)
        except Superseded as reason:
            log.info("superseded", record=record_id, reason=str(reason))
        except Stopping:
            log.info("interrupted by shutdown", record=record_id)
            _give_back(records, record)
        except (StorageFull, StoreAway, StoreRefuses) as reason:
            log.warning("waiting for the store", record=record_id, reason=str(reason))
            _give_back(records, record)
        except GivingWay as reason:
            next_task = reason.task
            _give_back(records, record)
        except Refused as refusal:
            log.info("refused", record=record_id, reason=str(refusal))
            _fail(records, record, refusal, retry_seconds=refusal.retry_seconds)
        except redis.RedisError:
            raise
        except Exception as error:
            log.exception("failed", record=record_id)
            _fail(records, record, error)
    if next_task is not None:  # after its lease has ended, or nobody could take it
        given_back = requeued_name(record_id, record.attempts - 1)
        runtime.repository.once(given_back, LONG_WAIT_SECONDS)  # it is not lost
        runtime.queue.enqueue(next_task, record_id, record.device_class)


def _give_back(records: Records[R], record: R) -> None:
    """Give the record back as it was: what stopped the work is not its fault."""
    with contextlib.suppress(Superseded):
        records.change(record.id, attempt=record.attempts, attempts=record.attempts - 1)


def _fail(records: Records[R], record: R, error: Exception, **changes: Any) -> None:
    with contextlib.suppress(Superseded):
        records.change(
            record.id,
            attempt=record.attempts,
            status="failed",
            error=f"{type(error).__name__}: {error}",
            problem=PROBLEMS.get(type(error)),
            **changes,
        )


def requeued_name(record_id: str, attempts: int) -> str:
    """Name under which a record is enqueued again once for each attempt."""
    return f"requeue:{record_id}:{attempts}"


class Reporter(Generic[R]):
    """Reporter that work calls between two steps: it tells progress, and stops unwanted work."""

    def __init__(self, runtime: Runtime, records: Records[R], record: R) -> None:
        self._runtime, self._records, self._record = runtime, records, record
        self._last = time.monotonic()

    def tell(
        self, progress: Callable[[], str] | None = None, *, every_seconds: float | None = None
    ) -> R | None:
        """Tell `progress` (JSON). Returns the present record if it was read: not more often
        than `every_seconds`, by default the runtime's `progress_seconds`.

        Raises Stopping, or Superseded by a cancellation.
        """
        self._runtime.leases.check_stopping()
        if not self._runtime.watch.resting:
            self._runtime.watch.moved()
        if every_seconds is None:
            every_seconds = self._runtime.progress_seconds
        if time.monotonic() - self._last < every_seconds:
            return None
        self._last = time.monotonic()
        current = self._records.get(self._record.id)
        if current.finished or current.attempts != self._record.attempts:
            raise Superseded(f"{self._record.id} is {current.status}")
        if progress is not None:
            self._records.tell(self._record.id, "progress", progress())
        return current
