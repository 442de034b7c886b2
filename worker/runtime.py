"""What a worker process holds, and the thread that keeps it honest.

A task runs under a lease that the worker renews. Whoever finds work that is under way without
a lease enqueues it again, so that no accepted request is lost with a process; `attempts` in
the record decides which of two workers may go on, and how often it is tried.
"""

import contextlib
import faulthandler
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
    process_resident_bytes,
    with_threads,
)
from learngenes.family.family import Family, FamilyError, load_family
from learngenes.training.tuning import Pause
from registry.errors import DeadlineMissed, IllegalTransition, ModelGone, StorageFull, Superseded
from registry.queue import Queue, make_celery
from registry.records import FamilyRecord, GenerationRecord, ModelRecord, WorkerRecord, now
from registry.repository import DEVICE_SECONDS, Records, Repository, connect
from registry.settings import Settings
from registry.store import ArtifactStore
from worker.build.restore import restore

log = structlog.get_logger()

R = TypeVar("R", bound=ModelRecord | GenerationRecord)

PROGRESS_SECONDS = 0.5
SWEEP_SECONDS = 600.0
COUNT_SECONDS = 60.0
LONG_WAIT_SECONDS = 600.0
LOST_AGAIN_SECONDS = 60.0
"""In a busy queue, what was begun and is nobody's is enqueued again so often: who took its message
may have been killed before it began."""
PROBLEMS: dict[type[Exception], str] = {
    DeadlineMissed: "deadline-missed",
    ModelGone: "model-gone",
}
"""What a caller is told of, not just that it failed."""
MOST_REQUEUED = 100
"""At a time."""
ORPHAN_SECONDS = 10.0
"""A queued record that is older, in no lease, while the queue is empty, has lost its message."""


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
            given_back = _requeued(record_id, record.attempts - 1)
            self.repository.once(given_back, LONG_WAIT_SECONDS)  # it is not lost
            self.queue.enqueue(next_task, record_id, record.device_class)


def _requeued(record_id: str, attempts: int) -> str:
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


class Housekeeping(Generic[R]):
    """Heartbeat, a search for lost work, and the store, every few seconds."""

    def __init__(
        self,
        runtime: Runtime,
        records: Records[R],
        queue: str,
        task: str,
        stuck_seconds: Callable[[], float],
        gauges: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """`stuck_seconds`: for how long its work has not moved. `gauges`: what a heartbeat tells
        besides; see registry.metrics.WORKER_GAUGES."""
        self._runtime, self._records, self._queue, self._task = runtime, records, queue, task
        self._stuck_seconds, self._gauges = stuck_seconds, gauges
        self._period_seconds = runtime.settings.lease_seconds / 3

    def start(self) -> None:
        """Each chore in a thread of its own: a heart beats, however much there is to tidy up."""
        for name, work in (
            ("heartbeat", self._live),
            ("lost work", lambda: self._repeat(self.requeue_lost)),
            ("store", lambda: self._repeat(self.tend_store)),
        ):
            threading.Thread(target=work, name=name, daemon=True).start()

    def _live(self) -> None:
        self._repeat(self.end_if_stuck, self.beat)
        with contextlib.suppress(redis.RedisError):  # it expires
            self._runtime.repository.take_back_heartbeat(self._runtime.worker_id)

    def _repeat(self, *chores: Callable[[], None]) -> None:
        while not self._runtime.stopping.is_set():
            for chore in chores:
                try:
                    chore()
                except Exception:  # the broker may be away for a while; work must not end with it
                    log.exception("housekeeping failed", queue=self._queue)
            self._runtime.stopping.wait(self._period_seconds)

    def end_if_stuck(self) -> None:
        """Its supervisor starts another process."""
        seconds = self._stuck_seconds()
        if seconds > self._runtime.settings.stuck_seconds:
            log.critical("stuck: this worker ends, its work is taken up again", seconds=seconds)
            faulthandler.dump_traceback()  # where each thread is
            os._exit(1)

    def beat(self) -> None:
        runtime = self._runtime
        beat = WorkerRecord(
            id=runtime.worker_id,
            queue=self._queue,
            device_class=runtime.device_class,
            torch_version=torch.__version__,
            families=sorted(runtime.families),
            gauges={**self._gauges(), "process_resident_bytes": process_resident_bytes()},
        )
        runtime.repository.heartbeat(beat, 3 * self._period_seconds)
        runtime.announce_families()

    def tend_store(self) -> None:
        """It looks at every file, which takes long where there are many."""
        runtime = self._runtime
        if runtime.repository.once("count", COUNT_SECONDS):
            runtime.repository.announce_store(runtime.store.used_bytes())
        if runtime.repository.once("sweep", SWEEP_SECONDS):
            runtime.store.sweep(runtime.settings.image_ttl_seconds)
            restore(runtime.store, runtime.repository.models)

    def requeue_lost(self) -> None:
        """Enqueue again what is under way without a lease, or waits without a message.

        A message too many does no harm, one too few would: what has waited very long is
        enqueued again even if the queue is not empty. Thousands too many would: a few at a time.
        """
        device_class, active = self._runtime.device_class, self._records.active()
        ours = [record for record in active if record.device_class == device_class]
        self._fail_unserved([record for record in active if record.device_class != device_class])
        waiting = self._runtime.queue.length(self._queue, device_class) if ours else 0
        patience = LONG_WAIT_SECONDS if waiting else ORPHAN_SECONDS
        requeued = 0
        for record in self._records.unleased([r for r in ours if self._may_be_lost(r, patience)]):
            once_in = patience if record.status == "queued" else min(patience, LOST_AGAIN_SECONDS)
            if requeued < MOST_REQUEUED and self._runtime.repository.once(
                _requeued(record.id, record.attempts), once_in
            ):
                requeued += 1
                log.warning("requeueing lost work", record=record.id, status=record.status)
                self._runtime.queue.enqueue(self._task, record.id, device_class)

    @staticmethod
    def _may_be_lost(record: R, patience: float) -> bool:
        """Of what is queued only if it is old; an age below zero: the clock was set back."""
        age_seconds = (now() - record.created_at).total_seconds()
        return record.status != "queued" or not 0 <= age_seconds < patience

    def _fail_unserved(self, records: list[R]) -> None:
        """Work for a class of device that has had no worker for hours would wait for ever."""
        for record in records:
            waited_seconds = (now() - record.created_at).total_seconds()
            if waited_seconds < DEVICE_SECONDS or self._records.leased(record.id):
                continue
            if not self._runtime.repository.served(self._queue, record.device_class):
                error = f"no worker of {record.device_class} for {DEVICE_SECONDS // 3600} hours"
                with contextlib.suppress(IllegalTransition):
                    self._records.change(record.id, status="failed", error=error)
