"""What a worker process holds, and the leases under which it works.

A task runs under a lease that the worker renews. Whoever finds work that is under way without
a lease enqueues it again, so that no accepted request is lost with a process; `attempts` in
the record decides which of two workers may go on, and how often it is tried.
"""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import redis
import structlog
import torch
from redis.exceptions import LockError
from redis.lock import Lock

from learngenes.device import (
    default_device,
    device_class,
    with_threads,
)
from learngenes.family.family import Family, FamilyError, load_family
from learngenes.training.tuning import Pause
from registry.errors import DeadlineMissed, ModelGone, StorageFull, Superseded
from registry.queue import Queue, make_celery
from registry.records import FamilyRecord, GenerationRecord, ModelRecord
from registry.repository import Records, Repository, connect
from registry.settings import Settings
from registry.store import ArtifactStore

log = structlog.get_logger()

R = TypeVar("R", bound=ModelRecord | GenerationRecord)

PROGRESS_SECONDS = 0.5
LONG_WAIT_SECONDS = 600.0
PROBLEMS: dict[type[Exception], str] = {
    DeadlineMissed: "deadline-missed",
    ModelGone: "model-gone",
}
"""What a caller is told of, not just that it failed."""


class Stopping(Pause):
    """The worker was told to stop; the record is taken up again after the next start."""


class GivingWay(Pause):
    """The work has had its turn while other work of its queue waits; it goes to the end of it."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.task = task


@dataclass
class Runtime:
    settings: Settings
    repository: Repository
    store: ArtifactStore
    queue: Queue
    device: torch.device
    families: dict[str, Family]
    directories: dict[str, Path]
    """Of each family."""
    worker_id: str = field(
        default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"
    )
    stopping: threading.Event = field(default_factory=threading.Event)
    moved_at: float | None = None
    """When what is watched last told that it moves; None while nothing is."""
    device_class: str = field(init=False)
    _kept_locks: dict[Lock, None] = field(default_factory=dict)
    _starting: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(cls, settings: Settings) -> "Runtime":
        """Load every family. Raises FamilyError when one is corrupt or there is none."""
        device = default_device()
        families, directories = {}, {}
        with with_threads(1):
            for path in sorted(settings.families_dir.glob("*/family.json")):
                family = load_family(path.parent).to(device)
                families[family.manifest.name] = family
                directories[family.manifest.name] = path.parent.resolve()
        if not families:
            raise FamilyError(
                f"no family in {settings.families_dir.resolve()}; set FINESERVE_FAMILIES_DIR"
            )
        return cls(
            settings=settings,
            repository=Repository(connect(settings.resolved_redis_url), settings.image_ttl_seconds),
            store=ArtifactStore(settings.resolved_store_dir),
            queue=Queue(make_celery(settings)),
            device=device,
            families=families,
            directories=directories,
        )

    def __post_init__(self) -> None:
        # now, since beside an engine a new thread counts fewer threads
        self.device_class = device_class(self.device)

    def family(self, name: str) -> Family:
        if name not in self.families:
            raise LookupError(
                f"this worker has no family {name!r} in {self.settings.families_dir}; "
                f"it has {', '.join(self.families) or 'none'}"
            )
        return self.families[name]

    def check_stopping(self) -> None:
        if self.stopping.is_set():
            raise Stopping

    def announce_families(self) -> None:
        for family in self.announced:
            self.repository.announce_family(family)

    @functools.cached_property
    def announced(self) -> list[FamilyRecord]:
        return [
            FamilyRecord(
                name=name,
                network=family.manifest.network,
                sizes=family.manifest.sizes,
                class_names=list(family.manifest.class_names),
                licence=family.manifest.licence,
                trained_steps=family.manifest.trained_steps,
                fingerprint=family.fingerprint,
                quality=family.quality,
            )
            for name, family in self.families.items()
        ]

    @contextlib.contextmanager
    def lease(self, records: Records[R], record_id: str) -> Iterator[R | None]:
        """Claim a record and keep the claim alive; None when there is nothing to do."""
        claim = records.claim(record_id, self.settings.max_attempts, self.settings.lease_seconds)
        if claim is None:
            yield None
            return
        try:
            with self.kept(claim.lease):
                yield claim.record
        finally:
            with contextlib.suppress(LockError):  # it ended with the work, or ran out
                claim.lease.release()

    @contextlib.contextmanager
    def kept(self, lock: Lock) -> Iterator[None]:
        """Renew a lock of `lease_seconds` for as long as this process lives."""
        self._kept_locks[lock] = None
        self._start_renewing()
        try:
            yield
        finally:
            del self._kept_locks[lock]

    @contextlib.contextmanager
    def device_alone(self) -> Iterator[None]:
        """Who measures a device waits for who compiles on it, and the other way round."""
        with self.alone(f"device:{self.device_class}"):
            yield

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """One worker at a time, of all. Raises Stopping."""
        lock = self.repository.lock(name, self.settings.lease_seconds)
        moved_at, self.moved_at = self.moved_at, None  # who waits for another is not stuck
        while not lock.acquire(blocking_timeout=self.settings.lease_seconds):
            self.check_stopping()
        try:
            with self.kept(lock):
                self.moved_at = moved_at and time.monotonic()
                yield
        finally:
            with contextlib.suppress(LockError):  # it ran out
                lock.release()

    @functools.cached_property
    def _renewing(self) -> threading.Thread:
        return threading.Thread(target=self._renew, name="renew", daemon=True)

    def _start_renewing(self) -> None:
        with self._starting:
            if not self._renewing.ident:
                self._renewing.start()

    def _renew(self) -> None:
        while True:
            time.sleep(self.settings.lease_seconds / 3)
            for lock in list(self._kept_locks):
                # when it ran out, the record's attempt tells the work so; and when Redis is
                # away, the next renewal may succeed
                with contextlib.suppress(LockError, redis.RedisError):
                    lock.reacquire()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What goes on inside tells now and then that it moves, or is taken to be stuck."""
        self.moved_at = time.monotonic()
        try:
            yield
        finally:
            self.moved_at = None

    def stuck_seconds(self) -> float:
        """For how long what is watched has told nothing."""
        moved_at = self.moved_at
        return 0.0 if moved_at is None else time.monotonic() - moved_at

    def _give_back(self, records: Records[R], record: R) -> None:
        """As it was: what stopped it is not the work's fault, and it is taken up again."""
        with contextlib.suppress(Superseded):
            records.change(record.id, attempt=record.attempts, attempts=record.attempts - 1)

    def attempt(self, records: Records[R], record_id: str, work: Callable[[R], None]) -> None:
        """Work on a record under a lease, and see to it that it ends in a state that is true.

        Running it twice, or half and then again, does no harm. When Redis is away the error
        goes up and the record stays as it is, for housekeeping to find.
        """
        next_task: str | None = None
        with self.lease(records, record_id) as record:
            if record is None:
                log.info("nothing to do", record=record_id)
                return
            try:
                work(record)
            except Superseded as reason:
                log.info("superseded", record=record_id, reason=str(reason))
            except Stopping:
                log.info("interrupted by shutdown", record=record_id)
                self._give_back(records, record)
            except StorageFull as reason:
                log.warning("waiting for room", record=record_id, reason=str(reason))
                self._give_back(records, record)
            except GivingWay as reason:
                next_task = reason.task
                self._give_back(records, record)
            except redis.RedisError:
                raise
            except Exception as error:
                log.exception("failed", record=record_id)
                problem = PROBLEMS.get(type(error))
                with contextlib.suppress(Superseded):
                    records.change(
                        record_id,
                        attempt=record.attempts,
                        status="failed",
                        error=f"{type(error).__name__}: {error}",
                        problem=problem,
                    )
        if next_task is not None:  # after its lease has ended, or nobody could take it
            given_back = requeued_name(record_id, record.attempts - 1)
            self.repository.once(given_back, LONG_WAIT_SECONDS)  # it is not lost
            self.queue.enqueue(next_task, record_id, record.device_class)


def requeued_name(record_id: str, attempts: int) -> str:
    """Once for each attempt, and again if that lasts."""
    return f"requeue:{record_id}:{attempts}"


class Reporter(Generic[R]):
    """Between two steps of a record's work: may stop it, and tells how it goes now and then."""

    def __init__(self, runtime: Runtime, records: Records[R], record: R) -> None:
        self._runtime, self._records, self._record = runtime, records, record
        self._last = time.monotonic()

    def tell(
        self, progress: Callable[[], str] | None = None, *, every_seconds: float | None = None
    ) -> R | None:
        """`progress` gives JSON. Gives the record as it is now, if it was read: not more often
        than `every_seconds`, by default PROGRESS_SECONDS.

        Raises Stopping, or Superseded by a cancellation.
        """
        self._runtime.check_stopping()
        if self._runtime.moved_at is not None:
            self._runtime.moved_at = time.monotonic()
        if every_seconds is None:
            every_seconds = PROGRESS_SECONDS
        if time.monotonic() - self._last < every_seconds:
            return None
        self._last = time.monotonic()
        current = self._records.get(self._record.id)
        if current.finished or current.attempts != self._record.attempts:
            raise Superseded(f"{self._record.id} is {current.status}")
        if progress is not None:
            self._records.tell(self._record.id, "progress", progress())
        return current
