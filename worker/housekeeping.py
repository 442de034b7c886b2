"""Chores of a worker beside its work: heartbeat, search for lost work, care of the store."""

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import redis
import structlog
import torch

from learngenes.device import process_resident_bytes
from registry.errors import IllegalTransition
from registry.lifecycle import Records
from registry.records import WorkerRecord, now
from worker.attempts import LONG_WAIT_SECONDS, requeued_name
from worker.build.restore import restore
from worker.leases import R, is_dead
from worker.runtime import Runtime

log = structlog.get_logger()

SWEEP_SECONDS = 600.0
COUNT_SECONDS = 60.0


@dataclass(frozen=True)
class Patience:
    """Limits after which work counts as lost."""

    orphan_seconds: float = 10.0
    """Age from which a queued record has lost its message if the queue is empty."""
    long_wait_seconds: float = LONG_WAIT_SECONDS
    lost_again_seconds: float = 60.0
    """Pause between enqueueing abandoned work again in a busy queue: who took its message may have
    been killed before it began."""
    most_requeued: int = 100
    """Most records that are enqueued again at a time."""


PATIENCE = Patience()


class Housekeeping(Generic[R]):
    """Chores that run every few seconds, each in a thread of its own."""

    def __init__(
        self,
        runtime: Runtime,
        records: Records[R],
        queue: str,
        task: str,
        stuck_seconds: Callable[[], float],
        gauges: Callable[[], dict[str, float]] = dict,
        problem: Callable[[], str] = str,
        patience: Patience = PATIENCE,
        after_beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`stuck_seconds` gives how long work has not moved, `gauges` what a heartbeat tells
        besides; see registry.metrics.WORKER_GAUGES. `problem` is what operators are to know."""
        self._runtime, self._records, self._queue, self._task = runtime, records, queue, task
        self._stuck_seconds, self._gauges, self._patience = stuck_seconds, gauges, patience
        self._problem, self._after_beat = problem, after_beat
        self._period_seconds = runtime.settings.lease_seconds / 3

    def start(self) -> None:
        """Start each chore in a thread of its own: a heart beats however long the others take."""
        for name, work in (
            ("heartbeat", self._live),
            ("lost work", lambda: self._repeat(self._look_for_lost_work)),
            ("store", lambda: self._repeat(self.tend_store)),
        ):
            threading.Thread(target=work, name=name, daemon=True).start()

    def _live(self) -> None:
        self._repeat(self.end_if_stuck, self.beat, self._after_beat)
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
        """End this process if its work is stuck; its supervisor starts another."""
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
            problem=self._problem(),
        )
        runtime.repository.heartbeat(beat, 3 * self._period_seconds)
        runtime.announce_families()

    def tend_store(self) -> None:
        """Count, sweep and restore, which looks at every file of the store."""
        runtime = self._runtime
        if runtime.repository.once("count", COUNT_SECONDS):
            runtime.repository.keep_store_bytes(runtime.store.used_bytes())
        if runtime.repository.once("sweep", SWEEP_SECONDS):
            runtime.store.sweep(runtime.settings.image_ttl_seconds)
            restore(runtime.store, runtime.repository.models)

    def _look_for_lost_work(self) -> None:
        """One worker of each kind does it for all: who looks reads all that is under way."""
        kind = f"lost:{self._queue}:{self._runtime.device_class}"
        if self._runtime.repository.once(kind, 0.9 * self._period_seconds):
            self.requeue_lost()

    def requeue_lost(self) -> None:
        """Enqueue again what is under way without a lease, or waits without a message.

        A message too many does no harm, one too few would: what has waited very long is
        enqueued again even if the queue is not empty. Thousands too many would: a few at a time.
        """
        device_class, active = self._runtime.device_class, self._records.active()
        ours = [record for record in active if record.device_class == device_class]
        self._fail_unserved([record for record in active if record.device_class != device_class])
        waiting = self._runtime.queue.length(self._queue, device_class) if ours else 0
        limits = self._patience
        patience = limits.long_wait_seconds if waiting else limits.orphan_seconds
        requeued = 0
        self._records.end_leases([r for r in ours if r.status != "queued"], is_dead)
        for record in self._records.unleased([r for r in ours if self._may_be_lost(r, patience)]):
            begun = record.status != "queued"
            once_in = min(patience, limits.lost_again_seconds) if begun else patience
            if requeued < limits.most_requeued and self._runtime.repository.once(
                requeued_name(record.id, record.attempts), once_in
            ):
                requeued += 1
                log.warning("requeueing lost work", record=record.id, status=record.status)
                self._runtime.queue.enqueue(self._task, record.id, device_class)

    @staticmethod
    def _may_be_lost(record: R, patience: float) -> bool:
        """Whether work may be lost: begun, or queued long ago. An age below zero means that the
        clock was set back."""
        age_seconds = (now() - record.created_at).total_seconds()
        return record.status != "queued" or not 0 <= age_seconds < patience

    def _fail_unserved(self, records: list[R]) -> None:
        """Fail work for a device class that has had no worker for hours."""
        most_seconds = self._runtime.repository.device_seconds
        for record in records:
            waited_seconds = (now() - record.created_at).total_seconds()
            if waited_seconds < most_seconds or self._records.leased(record.id):
                continue
            if not self._runtime.repository.served(self._queue, record.device_class):
                error = f"no worker of {record.device_class} for {most_seconds // 3600} hours"
                with contextlib.suppress(IllegalTransition):
                    self._records.change(record.id, status="failed", error=error)
