"""What a worker process holds, and the thread that keeps it honest.

A task runs under a lease that the worker renews. Whoever finds work that is under way without
a lease enqueues it again, so that no accepted request is lost with a process; `attempts` in
the record decides which of two workers may go on, and how often it is tried.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import redis
import structlog
import torch
from redis.exceptions import LockError

from learngenes.config import Mode
from learngenes.device import default_device, synchronise
from learngenes.family import Family, load_family
from learngenes.sizing import Workload
from learngenes.sizing.cost import flops
from registry.queue import Queue, make_celery
from registry.records import FamilyRecord, Record, WorkerRecord, now
from registry.repository import Records, Repository, connect
from registry.settings import Settings
from registry.store import ArtifactStore

log = structlog.get_logger()

R = TypeVar("R", bound=Record)

ORPHAN_SECONDS = 10.0
"""A queued record that is older, in no lease, while the queue is empty, has lost its message."""


class Stopping(Exception):
    """The worker was told to stop; the record is taken up again after the next start."""


@dataclass
class Runtime:
    settings: Settings
    repository: Repository
    store: ArtifactStore
    queue: Queue
    device: torch.device
    families: dict[str, Family]
    worker_id: str = field(
        default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"
    )
    stopping: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, settings: Settings) -> "Runtime":
        """Load every family. Raises FamilyError when one is corrupt or there is none."""
        device = default_device()
        families = {
            family.manifest.name: family.to(device)
            for family in (
                load_family(path.parent)
                for path in sorted(settings.families_dir.glob("*/family.json"))
            )
        }
        return cls(
            settings=settings,
            repository=Repository(connect(settings.resolved_redis_url), settings.image_ttl_seconds),
            store=ArtifactStore(settings.resolved_store_dir),
            queue=Queue(make_celery(settings)),
            device=device,
            families=families,
        )

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
        for name, family in self.families.items():
            manifest = family.manifest
            self.repository.announce_family(
                FamilyRecord(
                    name=name,
                    network=manifest.network.model_dump(),
                    sizes={k: list(v) for k, v in manifest.sizes.model_dump().items()},
                    class_names=list(manifest.class_names),
                    licence=manifest.licence,
                    trained_steps=manifest.trained_steps,
                    flops_per_second=flops_per_second(family, self.device),
                )
            )

    @contextlib.contextmanager
    def lease(self, records: Records[R], record_id: str) -> Iterator[R | None]:
        """Claim a record and keep the claim alive; None when there is nothing to do."""
        seconds = self.settings.lease_seconds
        claim = records.claim(record_id, self.settings.max_attempts, seconds)
        if claim is None:
            yield None
            return
        done = threading.Event()

        def renew() -> None:
            while not done.wait(seconds / 3):
                with contextlib.suppress(redis.RedisError):  # the next renewal may succeed
                    claim.lease.reacquire()

        thread = threading.Thread(target=renew, name=f"lease-{record_id}", daemon=True)
        thread.start()
        try:
            yield claim.record
        finally:
            done.set()
            thread.join()
            with contextlib.suppress(LockError):  # it ran out and another worker has it
                claim.lease.release()


class Housekeeping(Generic[R]):
    """Heartbeat, and a search for lost work, every few seconds in a thread of its own."""

    def __init__(self, runtime: Runtime, records: Records[R], queue: str, task: str) -> None:
        self._runtime, self._records, self._queue, self._task = runtime, records, queue, task
        self._period_seconds = runtime.settings.lease_seconds / 3

    def start(self) -> None:
        threading.Thread(target=self._run, name="housekeeping", daemon=True).start()

    def _run(self) -> None:
        while not self._runtime.stopping.is_set():
            try:
                self.tend()
            except Exception:  # the broker may be away for a while; work must not end with it
                log.exception("housekeeping failed", queue=self._queue)
            self._runtime.stopping.wait(self._period_seconds)

    def tend(self) -> None:
        runtime = self._runtime
        beat = WorkerRecord(
            id=runtime.worker_id,
            queue=self._queue,
            device=str(runtime.device),
            families=sorted(runtime.families),
        )
        runtime.repository.heartbeat(beat, 3 * self._period_seconds)
        self.requeue_lost()
        runtime.store.sweep("generations", runtime.settings.image_ttl_seconds)

    def requeue_lost(self) -> None:
        """Enqueue again what is under way without a lease, or waits without a message."""
        for record in self._records.active():
            age = (now() - record.created_at).total_seconds()
            if self._records.leased(record.id):
                continue
            if record.status == "queued" and (
                age < ORPHAN_SECONDS or self._runtime.queue.length(self._queue) > 0
            ):
                continue
            if self._runtime.repository.once(f"requeue:{record.id}", ORPHAN_SECONDS):
                log.warning("requeueing lost work", record=record.id, status=record.status)
                self._runtime.queue.enqueue(self._task, record.id)


def flops_per_second(family: Family, device: torch.device, repeats: int = 3) -> float:
    """Speed of this device on this family's own forward pass at full size (best of some)."""
    network = family.manifest.network
    workload = Workload()
    model = family.assemble(family.scales, Mode.MATERIALISED)
    shape = (workload.rows, network.in_channels, network.sample_size, network.sample_size)
    x = torch.zeros(shape, device=device)
    zeros = torch.zeros(workload.rows, dtype=torch.long, device=device)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            model(x, zeros, zeros)
            synchronise(device)
            best = min(best, time.perf_counter() - started)
    return flops(network, family.full_size, Mode.MATERIALISED, workload) / best


def describe_error(error: BaseException) -> dict[str, Any]:
    """Fields of a record that failed with `error`."""
    return {"status": "failed", "error": f"{type(error).__name__}: {error}"}
