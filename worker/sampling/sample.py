"""The sampling task: hands its request to the engine, waits, and stores the images.

Many of these tasks wait in one process; the engine steps what they asked for together.
"""

import base64
import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterator

import structlog
from redis import RedisError

from learngenes.data.images import as_picture, encode_png
from learngenes.device import capacity_bytes
from learngenes.family.family import Family
from learngenes.measuring.device import computes
from learngenes.measuring.quiet import Quiet
from registry import metrics
from registry.errors import DeadlineMissed, ModelGone, RecordNotFound
from registry.queue import SAMPLE_TASK
from registry.records import GenerationRecord, GenerationStatus, ModelRecord, now
from registry.store import generation_name, image_file
from worker.attempts import GivingWay, Reporter, attempt
from worker.runtime import Runtime
from worker.sampling.compiler import Compiler
from worker.sampling.engine import Engine
from worker.sampling.jobs import EngineStopped, Job
from worker.sampling.kept_steps import KeptSteps
from worker.sampling.requests import elastic_of, request_of, served_by
from worker.sampling.room import Room

log = structlog.get_logger()

PREVIEW_PIXELS = 64
WAITING_PERIODS = 4
"""Factor by which a waiting request looks less often whether it is still wanted."""
LOOK_SECONDS = 0.2
"""Seconds after which an engine that measures looks again whether somebody wants the device."""
SWITCH_SECONDS = 0.0005
"""Seconds that a waiting task may hold Python's lock; 5 ms by default."""


class Sampling:
    def __init__(self, runtime: Runtime) -> None:
        """Start the engine, which serves at once; `quicken` it later."""
        self.runtime = runtime
        settings = runtime.settings
        budget_bytes = capacity_bytes(runtime.device)
        if settings.device_mem_gb is not None:
            budget_bytes = int(settings.device_mem_gb * 1e9)
        self.engine = Engine(
            runtime.families.values(),
            budget_bytes,
            max_rows=settings.max_batch_rows,
            latency_target_ratio=settings.latency_target_ratio,
            profile_seconds=settings.profile_seconds / len(computes(runtime.device)),
            idle_release_seconds=settings.idle_release_seconds or math.inf,
            kept=KeptSteps(runtime),
            alone=self._alone,
            others_wait=self._others_wait,
        )
        self.room = Room(runtime, lambda: self.engine.gauges)
        self._looked_at, self._device_wanted = 0.0, False
        self._quiet = Quiet(runtime.device)
        self._others = 0
        """Number of generations that nobody times, since one was timed."""
        self.compiler = Compiler(
            self.engine, self._families, settings.resolved_kernels_dir, alone=runtime.device_alone
        )
        sys.setswitchinterval(SWITCH_SECONDS)
        self.engine.start()
        gc.collect()
        gc.freeze()  # else each full collection walks all that torch has made

    def _families(self) -> list[Family]:
        """Families that are loaded, the default one first."""
        default, loaded = self.runtime.settings.default_family, self.runtime.families.values()
        return sorted(loaded, key=lambda family: family.manifest.name != default)

    def quicken(self) -> None:
        """Serve by compiled kernels, as soon as there are some, and measure what is idle."""
        self.compiler.start(compile=self.runtime.settings.compile)

    def take_families(self) -> None:
        """Serve what has been loaded since the start, too."""
        self.engine.add(self._families())

    @property
    def gauges(self) -> dict[str, float]:
        """Values of registry.metrics.WORKER_GAUGES."""
        return {**self.engine.gauges, **self.engine.elastic_gauges, **self.compiler.gauges}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else measures, or compiles, on this class of device."""
        if self.compiler.busy:
            yield False
            return
        with self.runtime.device_first() as first:
            yield first

    def _others_wait(self) -> bool:
        """Whether a build waits for the device; asked before every step, looked up now and then."""
        if time.monotonic() >= self._looked_at + LOOK_SECONDS:
            self._looked_at = time.monotonic()
            with contextlib.suppress(RedisError):
                self._device_wanted = self.runtime.device_wanted()
        return self._device_wanted

    def generate(self, generation_id: str) -> None:
        """Make the images of a queued generation.

        One that has ended its worker twice has its last attempt alone: what ran beside it had
        its attempts used up, too, and is not to end with it.
        """
        generations, most = self.runtime.repository.generations, self.runtime.settings.max_attempts
        with contextlib.ExitStack() as alone:
            with contextlib.suppress(RecordNotFound):
                if 0 < most - 1 <= generations.get(generation_id).attempts:
                    alone.enter_context(self.runtime.leases.alone("last attempts"))
            attempt(self.runtime, generations, generation_id, self._run)

    def _run(self, record: GenerationRecord) -> None:
        _require_wanted(record)
        repository = self.runtime.repository
        model = None if record.family is not None else self._model(record)
        if not record.timed:
            self._others += 1
        started_at = now()
        with _vital():
            if record.elastic is not None:
                elastic = elastic_of(self.runtime, record, record.elastic, model)
                job = self.engine.submit_elastic(elastic)
            else:
                assert model is not None, "only elastic requests ask a family"
                job = self.engine.submit(request_of(self.runtime, record, model))
        self._follow(job, record)
        finished_at = now()
        with _vital():  # nobody has cancelled the job
            pictures = [encode_png(as_picture(image)) for image in job.images()]
        self.runtime.store.put(
            generation_name(record.id),
            {image_file(i): picture for i, picture in enumerate(pictures)},
            {"record": record.model_dump(mode="json")},
        )
        repository.generations.change(
            record.id,
            attempt=record.attempts,
            known=record,
            status=GenerationStatus.DONE,
            revision=model.revision if model else None,
            started_at=started_at,
            finished_at=finished_at,
            **served_by(job, record),
        )
        self.engine.delivered(job)
        if record.timed:
            repository.tell_disturbance(record.id, self._disturbed_by())
        else:
            metrics.IMAGES.labels(job.request.depth).inc(len(pictures))

    def _disturbed_by(self) -> str:
        """What else used the device since this was asked last; empty for nothing."""
        others = self._others + int(self.engine.gauges.get("engine_running", 0))
        disturbed, self._others = self._quiet.disturbed_by(), 0
        return f"{others} generations of others" if others else disturbed

    def _model(self, record: GenerationRecord) -> ModelRecord:
        """Model of a request. Raises ModelGone."""
        model = self.runtime.repository.models.get(record.model)
        if not model.servable:
            raise ModelGone(f"model {record.model} is {model.status}")
        return model

    def _follow(self, job: Job, record: GenerationRecord) -> None:
        """Follow a job to its end: tell its progress, and cancel it when nobody wants it.

        Of one that waits its turn there is nothing to tell, and with many that do, whatever is
        done for each takes from those that run.
        """
        reporter = Reporter(self.runtime, self.runtime.repository.generations, record)
        seen, period = job.progress, self.runtime.progress_seconds
        try:
            while not job.wait(period):
                before, seen = seen, job.progress
                if seen != before:
                    reporter.tell(lambda: self._progress(job, record), every_seconds=0)
                else:
                    reporter.tell(every_seconds=WAITING_PERIODS * period)
                _require_wanted(record)
                if seen[0] == 0 and not record.timed and self.room.gives_back():
                    raise GivingWay(SAMPLE_TASK)
        except BaseException:
            self.engine.cancel(job)
            raise

    def _progress(self, job: Job, record: GenerationRecord) -> str:
        step, steps = job.progress
        progress: dict[str, object] = {"step": step, "steps": steps}
        if record.previews and (pixels := self.engine.preview(job)) is not None:
            png = encode_png(as_picture(pixels), PREVIEW_PIXELS)
            progress["b64_png"] = base64.b64encode(png).decode()
        return json.dumps(progress)


@contextlib.contextmanager
def _vital() -> Iterator[None]:
    """End this process when the engine's loop has failed: only a new process helps."""
    try:
        yield
    except EngineStopped:
        log.critical("the engine broke; this worker ends, its requests are taken up again")
        os._exit(1)


def _require_wanted(record: GenerationRecord) -> None:
    """Raise DeadlineMissed when nobody waits any more."""
    if record.deadline is not None and now() > record.deadline:
        raise DeadlineMissed(f"{record.id} was not done by {record.deadline:%H:%M:%S} UTC")
