"""Metrics of the service: requests as they come, and what is there when somebody asks."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence

import redis
from fastapi import FastAPI
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import default

from registry.metrics import NAMESPACE, WORKER_GAUGES
from registry.records import WorkerRecord
from service.deps import State
from service.status import WORKER_QUEUES, waiting


def instrument(app: FastAPI) -> None:
    """Count requests and time them, by route."""
    _instrumentator().instrument(app)


@functools.cache
def _instrumentator() -> Instrumentator:
    """One for all applications of a process: their metrics have the same names."""
    counting = default(metric_namespace=NAMESPACE, should_exclude_streaming_duration=True)
    assert counting is not None, "somebody else counts by these names"
    return Instrumentator(excluded_handlers=["/metrics", "/healthz"]).add(counting)


class Present(Collector):
    """Gauges, read at each scrape. Without Redis there is little to tell, and it says so."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        free = state.store.free_bytes()
        yield _gauge("store_disk_free_bytes", "Free where the artifacts are.", free)
        try:
            workers = state.repository.workers()
            gauges = [*self._queues(workers), *self._models(), *self._workers(workers)]
            memory = state.repository.memory_bytes()
            store = state.repository.store_bytes()
        except redis.RedisError:
            yield _gauge("redis_up", "Whether Redis answers.", 0)
            return
        yield _gauge("redis_up", "Whether Redis answers.", 1)
        yield _gauge("redis_memory_bytes", "What Redis holds.", memory)
        used = GaugeMetricFamily(f"{NAMESPACE}_store_bytes", "Of artifacts.", labels=["kind"])
        for kind, size in sorted(store.items()):
            used.add_metric([kind], size)
        yield used
        yield from gauges

    def _queues(self, workers: Sequence[WorkerRecord]) -> Iterator[Metric]:
        state = self._state
        depth = GaugeMetricFamily(
            f"{NAMESPACE}_queue_depth", "Messages that no worker has taken.", labels=["queue"]
        )
        for queue, messages in waiting(state, workers).items():
            depth.add_metric([queue], messages)
        yield depth
        active = GaugeMetricFamily(
            f"{NAMESPACE}_active", "Accepted and not finished.", labels=["kind"]
        )
        for records in (state.repository.models, state.repository.generations):
            active.add_metric([records.name], records.count_active())
        yield active

    def _models(self) -> Iterator[Metric]:
        models = GaugeMetricFamily(f"{NAMESPACE}_models", "Models there are.", labels=["status"])
        for status, count in Counter(m.status for m in self._state.repository.models.all()).items():
            models.add_metric([status], count)
        yield models

    def _workers(self, workers: Sequence[WorkerRecord]) -> Iterator[Metric]:
        """What they said in their last heartbeat: of a dead one, nothing."""
        alive = GaugeMetricFamily(
            f"{NAMESPACE}_workers", "Workers whose heart beats.", labels=["queue"]
        )
        count = Counter(worker.queue for worker in workers)
        for queue in WORKER_QUEUES:
            alive.add_metric([queue], count[queue])
        yield alive
        for name, what in WORKER_GAUGES.items():
            family = GaugeMetricFamily(
                f"{NAMESPACE}_{name}", what, labels=["worker", "device_class"]
            )
            for worker in workers:
                if name in worker.gauges:
                    family.add_metric([worker.name, worker.device_class], worker.gauges[name])
            yield family


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{NAMESPACE}_{name}", what, value=value)
