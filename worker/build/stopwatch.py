"""Latency of a model as a caller waits for it: real generations, by the workers that serve.

They take the way of everybody's: queue, engine, store. Each is timed by the clock of Redis, from
its acceptance to its end, to which comes what an answer takes; a sampling worker tells whether
anything disturbed it.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from learngenes.sizing.budget import Workload
from registry.errors import IllegalTransition
from registry.queue import SAMPLE_QUEUE, SAMPLE_TASK
from registry.records import GenerationRecord, GenerationStatus, ModelRecord, WorkerRecord
from worker.runtime import Runtime

OWNER = "fineserve"
"""Owner of what is generated only to be timed."""
WARMING_RUNS = 2
LEAST_RUNS = 5
MOST_RUNS = 20
LONG_SECONDS = 15.0
"""Seconds from which on a request counts as long: of those fewer are timed, else a model whose
requests take minutes would be measured for an hour."""
LONG_RUNS = 2
REPEATED = 3
"""Factor of the allowed time after which a disturbed measurement is reported as such."""
IDLE_SECONDS = 30.0
"""Seconds that it waits for a device that is busy with others' requests."""
LONGEST_SECONDS = 60.0
"""Seconds after which it gives up if the last worker that serves is gone."""
ANSWER_SECONDS = 0.01
"""Seconds that a caller waits beside those from acceptance to end: HTTP, and the pictures in it
(measured over HTTP on two cores)."""
POLL_SECONDS = 0.01
TOLD_SECONDS = 2.0
"""Seconds in which the worker tells what disturbed a generation that is done."""


@dataclass(frozen=True)
class Timing:
    """Seconds that callers wait for one batch of a model."""

    latency_seconds: float
    """Median."""
    latency_p95_seconds: float
    overhead_seconds: float
    """Median of what the engine does not work for a request: queue, pictures, store."""
    disturbed: str = ""
    """What disturbed the measurement, which then is not to be relied on; empty for nothing."""


class Stopwatch:
    def __init__(
        self,
        runtime: Runtime,
        max_seconds: float,
        on_wait: Callable[[], object],
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """`on_wait` is called now and then and may raise to stop."""
        self._runtime, self._max_seconds = runtime, max_seconds
        self._on_wait, self._idle_seconds = on_wait, idle_seconds
        self._generations = runtime.repository.generations

    def time(self, model: ModelRecord, workload: Workload) -> Timing | None:
        """Timing of a model that can be served; None where no worker serves it.

        Nothing is compiled or profiled on this class of device meanwhile.
        """
        if not self._is_served(model, self._runtime.repository.expected_workers()):
            return None
        with self._runtime.device_alone():
            self._wait_for_idleness()
            return self._time(model, workload)

    def _time(self, model: ModelRecord, workload: Workload) -> Timing | None:
        least = LEAST_RUNS
        for _ in range(WARMING_RUNS):
            if (warming := self._run(model, workload)) is None:
                return None
            if warming[0] > LONG_SECONDS:
                least = LONG_RUNS
                break
        alone: list[tuple[float, float]] = []
        beside: list[tuple[float, float]] = []
        disturbed, began = "", time.monotonic()
        while len(alone) < MOST_RUNS:
            seconds = time.monotonic() - began
            if len(alone) >= least and seconds > self._max_seconds:
                break
            if len(alone) + len(beside) >= least and seconds > REPEATED * self._max_seconds:
                break
            run = self._run(model, workload)
            if run is None:
                return None
            *took, said = run
            (beside if said else alone).append((took[0], took[1]))
            disturbed = said or disturbed
        enough = len(alone) >= least
        totals, overheads = zip(*(alone if enough else alone + beside), strict=True)
        return Timing(
            latency_seconds=float(np.median(totals)),
            latency_p95_seconds=float(np.quantile(totals, 0.95)),
            overhead_seconds=float(np.median(overheads)),
            disturbed="" if enough else disturbed,
        )

    @staticmethod
    def _is_served(model: ModelRecord, workers: Sequence[WorkerRecord]) -> bool:
        return any(
            worker.queue == SAMPLE_QUEUE
            and worker.device_class == model.device_class
            and model.family in worker.families
            for worker in workers
        )

    def _wait_for_idleness(self) -> None:
        deadline = time.monotonic() + self._idle_seconds
        while time.monotonic() < deadline and any(
            record.device_class == self._runtime.device_class
            for record in self._generations.active()
        ):
            self._on_wait()
            time.sleep(0.1)

    def _run(self, model: ModelRecord, workload: Workload) -> tuple[float, float, str] | None:
        """Seconds of a generation, those beside the engine's, and what disturbed it.

        None where it failed.
        """
        classes = len(model.class_names or self._runtime.family(model.family).manifest.class_names)
        record = self._generations.create(
            GenerationRecord(
                id=GenerationRecord.new_id(),
                model=model.id,
                device_class=model.device_class,
                owner=OWNER,
                timed=True,
                class_labels=[i % classes for i in range(workload.n)],
                seeds=list(range(workload.n)),
                **dict(workload.sampling),
            )
        )
        self._runtime.queue.enqueue(SAMPLE_TASK, record.id, record.device_class)
        until = time.monotonic() + LONGEST_SECONDS
        while not record.finished:
            workers = self._runtime.repository.workers
            if time.monotonic() > until and not self._is_served(model, workers()):
                with contextlib.suppress(IllegalTransition):
                    self._generations.change(record.id, status=GenerationStatus.CANCELLED)
                return None
            self._on_wait()
            time.sleep(POLL_SECONDS)
            record = self._generations.get(record.id)
        if record.status != "done":
            return None
        assert record.started_at is not None
        assert record.finished_at is not None
        seconds = self._generations.seconds(record.id) + ANSWER_SECONDS
        working = (record.finished_at - record.started_at).total_seconds()
        return seconds, max(0.0, seconds - working), self._disturbed(record.id)

    def _disturbed(self, generation_id: str) -> str:
        until = time.monotonic() + TOLD_SECONDS
        while time.monotonic() < until:
            said = self._runtime.repository.disturbance(generation_id)
            if said is not None:
                return said
            time.sleep(POLL_SECONDS)
        return "the worker that served it does not say"
