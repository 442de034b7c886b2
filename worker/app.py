"""The Celery application of the workers, started by `python -m worker`.

A thread pool: the process that holds the models is the one that answers to signals, and CUDA is
never touched before a fork. A build worker has one thread; the many of a sampling worker hand
their requests to its engine and wait.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import structlog
from celery.signals import worker_init, worker_ready, worker_shutting_down
from celery.worker import WorkController
from celery.worker.consumer import Consumer
from prometheus_client import start_http_server
from redis import RedisError

from fineserve.wire import ExportFormat
from learngenes.family.family import FamilyError
from registry import tracing
from registry.errors import StoreAway, StoreRefuses
from registry.logs import configure_logging
from registry.metrics import registry as counted
from registry.queue import (
    BUILD_QUEUE,
    BUILD_TASK,
    EXPORT_TASK,
    SAMPLE_QUEUE,
    SAMPLE_TASK,
    make_celery,
)
from registry.settings import Settings, get_settings
from registry.store import PREVIEWS_FILE, family_name
from worker import broker
from worker.build.build import build
from worker.build.profiles import Profiler, ensure_profile
from worker.build.restore import restore
from worker.build.verify import VerificationError
from worker.housekeeping import Housekeeping
from worker.runtime import Runtime
from worker.sampling.sample import Sampling

log = structlog.get_logger()

PATIENCE_SECONDS = 5.0
"""Seconds that a start leaves to first requests, before families that nobody has asked for are
loaded, and kernels."""

PUBLISHED_SECONDS = 15.0
"""Seconds after which a worker looks again for families that were published."""
LOOK_SECONDS = 0.05
"""Seconds after which a worker looks again whether it has room for one more task."""


class Worker:
    """State that the tasks of one process share."""

    sampler: Sampling
    """Sampler of a worker that serves the sample queue; no other has one."""

    def __init__(
        self,
        settings: Settings,
        *,
        profile: Callable[[Runtime, str], object] = ensure_profile,
        sampling: Callable[[Runtime], Sampling] = Sampling,
    ) -> None:
        self.runtime = Runtime.start(settings, at_once=False)
        self._profile, self._sampling = profile, sampling

    def serve(self, queues: set[str]) -> None:
        """Announce the families, tend the queues in the background, estimate before building."""
        repository = self.runtime.repository
        self.runtime.announce_families()
        self._publish_previews()
        if SAMPLE_QUEUE in queues:
            self.sampler = self._sampling(self.runtime)
            Housekeeping(
                self.runtime,
                repository.generations,
                SAMPLE_QUEUE,
                SAMPLE_TASK,
                self.sampler.engine.watch.stuck_seconds,
                lambda: self.sampler.gauges,
                lambda: self.sampler.compiler.problem or self.runtime.problem,
                after_beat=self.sampler.room.look_around,
            ).start()
            broker.QoS.room = self.sampler.room.for_another
            self.runtime.on_published = self.sampler.take_families
        if BUILD_QUEUE in queues:
            restore(self.runtime.store, repository.models)
            Housekeeping(
                self.runtime,
                repository.models,
                BUILD_QUEUE,
                BUILD_TASK,
                self.runtime.watch.stuck_seconds,
                problem=lambda: self.runtime.problem,
            ).start()
            families, default = self.runtime.families, self.runtime.settings.default_family
            first = default if default in families else next(iter(families))
            if families[first].quality:  # else nothing can be planned for it
                self._profile(self.runtime, first)
            if SAMPLE_QUEUE not in queues:
                os.nice(self.runtime.settings.build_nice)  # of this thread, and those to come
            Profiler(self.runtime).start()  # and the others
        threading.Thread(target=self._load_rest, name="families", daemon=True).start()
        log.info("worker ready", queues=sorted(queues), families=sorted(self.runtime.families))

    def _load_rest(self) -> None:
        """What the first image need not wait for: other families, kernels, previews."""
        self.runtime.hurry.wait(PATIENCE_SECONDS)
        self.runtime.load_rest(despite_errors=True)
        if hasattr(self, "sampler"):
            self.sampler.take_families()
            self.sampler.quicken()
        with contextlib.suppress(RedisError):  # housekeeping announces them again
            self.runtime.announce_families()
        self._publish_previews()
        while not self.runtime.stopping.wait(PUBLISHED_SECONDS):
            with contextlib.suppress(RedisError, StoreAway, StoreRefuses):  # look again
                if self.runtime.take_published():
                    self.runtime.announce_families()
                    self._publish_previews()

    def _publish_previews(self) -> None:
        """Put the families' previews into the store, since the service has no family files."""
        for name, family in self.runtime.families.items():
            sheet = self.runtime.directories[name] / PREVIEWS_FILE
            if sheet.exists():
                content = {PREVIEWS_FILE: sheet.read_bytes()}
                self.runtime.store.put(family_name(family.fingerprint), content, {})


class Process:
    """Celery process, and the worker in it once it has started."""

    def __init__(
        self, settings: Settings, make_worker: Callable[[Settings], Worker] = Worker
    ) -> None:
        self._settings, self._make_worker = settings, make_worker
        self._worker: Worker | None = None
        broker.install()
        self.app = make_celery(settings)
        self.app.task(self._build, name=BUILD_TASK)
        self.app.task(self._export, name=EXPORT_TASK)
        self.app.task(self._sample, name=SAMPLE_TASK)

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "a task came before the worker"
        return self._worker

    def _build(self, model_id: str) -> None:
        build(self.worker.runtime, model_id)

    def _export(self, model_id: str, form: str) -> None:
        from worker.export.export import export  # it takes a second to import

        export(self.worker.runtime, model_id, ExportFormat(form))

    def _sample(self, generation_id: str) -> None:
        self.worker.sampler.generate(generation_id)

    def start(self, sender: WorkController, **_: Any) -> None:
        settings = self._settings
        configure_logging(settings.log_format)
        tracing.start("worker")
        for chatty in ("celery.worker.strategy", "celery.app.trace"):  # two lines a request
            logging.getLogger(chatty).setLevel(logging.WARNING)
        try:
            if settings.metrics_port is not None:
                start_http_server(settings.metrics_port, settings.metrics_host, counted())
            self._worker = self._make_worker(settings)
            queues = sender.app.amqp.queues.consume_from
            self._worker.serve({name.partition(".")[0] for name in queues})
        except Exception as error:  # Celery would go on, and lose what it is told to do
            known = isinstance(error, FamilyError | RedisError | VerificationError)
            log.critical("the worker cannot start", reason=str(error), exc_info=not known)
            # a family does not heal by restarting
            raise SystemExit(os.EX_CONFIG if isinstance(error, FamilyError) else 1) from error

    @staticmethod
    def ready(sender: Consumer, **_: Any) -> None:
        """Look often whether there is room: nothing wakes the loop when a task has ended."""
        sender.hub.call_repeatedly(LOOK_SECONDS, lambda: None)

    def stop(self, **_: Any) -> None:
        if self._worker is not None:
            self._worker.runtime.stopping.set()


process = Process(get_settings())
worker_init.connect(process.start, weak=False)
worker_ready.connect(process.ready, weak=False)
worker_shutting_down.connect(process.stop, weak=False)
app = process.app
