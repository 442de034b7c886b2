"""Metrics of the service: requests as they come, and gauges that are read when somebody asks."""

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import redis
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import default

from fineserve.wire import ProfileResponse
from registry.metrics import NAMESPACE, WORKER_GAUGES
from registry.metrics import registry as counted
from registry.records import now
from service.deps import State
from service.planning import profiles
from service.status import WORKER_QUEUES, waiting

REST = 10.0
"""How many times as long as a scrape took it is told again."""
MOST_REST_SECONDS = 1.0


def instrument(app: FastAPI) -> None:
    """Count requests and time them, by route."""
    _instrumentator().instrument(app)


@functools.cache
def _instrumentator() -> Instrumentator:
    """Instrumentator of all applications of a process, whose metrics have the same names."""
    counting = default(metric_namespace=NAMESPACE, should_exclude_streaming_duration=True)
    assert counting is not None, "another instrumentator counts by these names"
    return Instrumentator(excluded_handlers=["/metrics", "/healthz"]).add(counting)


PROFILE_GAUGES: tuple[tuple[str, str, Callable[[ProfileResponse], float]], ...] = (
    (
        "profile_age_seconds",
        "Time since a device was estimated or measured for a family.",
        lambda profile: (now() - profile.measured_at).total_seconds(),
    ),
    (
        "profile_estimated",
        "Whether some latencies of a family are estimates.",
        lambda profile: float(profile.estimated),
    ),
    (
        "profile_correction_ratio",
        "What models took beside what the device was measured to take.",
        lambda profile: profile.speed_correction,
    ),
)
"""Name, meaning and value of what is told of each profile."""


class Present(Collector):
    """Gauges, read at each scrape; without Redis there are only two."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        free = {(): self._state.store.free_bytes()}
        yield _gauge("store_disk_free_bytes", "Free space on the disk of the artifacts.", free)
        try:
            gauges = list(self._of_redis())
        except redis.RedisError:
            gauges = []
        yield _gauge("redis_up", "Whether Redis answers.", {(): bool(gauges)})
        yield from gauges

    def _of_redis(self) -> Iterator[Metric]:
        repository = self._state.repository
        workers = repository.workers()
        expected = repository.expected_workers(workers)
        memory = {(): repository.memory_bytes()}
        yield _gauge("redis_memory_bytes", "Memory that Redis holds.", memory)
        stored = {(kind,): size for kind, size in sorted(repository.store_bytes().items())}
        yield _gauge("store_bytes", "Size of the artifacts.", stored, "kind")
        depth = {(queue,): length for queue, length in waiting(self._state, expected).items()}
        yield _gauge("queue_depth", "Messages that no worker has taken.", depth, "queue")
        both = (repository.models, repository.generations)
        active = {(records.name,): records.count_active() for records in both}
        yield _gauge("active", "Records accepted and not finished.", active, "kind")
        models = Counter((model.status,) for model in repository.models.all())
        yield _gauge("models", "Models, by status.", models, "status")
        count = Counter(worker.queue for worker in workers)
        alive = {(queue,): count[queue] for queue in WORKER_QUEUES}
        yield _gauge("workers", "Workers that send heartbeats.", alive, "queue")
        known = profiles(repository, repository.families())
        for name, what, of in PROFILE_GAUGES:
            told = {(p.family, p.device_class): of(p) for p in known}
            yield _gauge(name, what, told, "family", "device_class")
        for name, what in WORKER_GAUGES.items():
            told = {
                (worker.name, worker.device_class): worker.gauges[name]
                for worker in workers
                if name in worker.gauges
            }
            yield _gauge(name, what, told, "worker", "device_class")


def _gauge(name: str, what: str, values: Mapping[Any, float], *labels: str) -> Metric:
    """A gauge with a value for each tuple of labels."""
    gauge = GaugeMetricFamily(f"{NAMESPACE}_{name}", what, labels=labels)
    for of, value in values.items():
        gauge.add_metric(of, value)
    return gauge


class Scrapes:
    """Text of all metrics, made in a tenth of the time at most, however often somebody asks."""

    def __init__(self, state: State) -> None:
        self._present = CollectorRegistry()
        self._present.register(Present(state))
        self._making = threading.Lock()
        self._text, self._good_until = b"", 0.0

    def text(self) -> bytes:
        with self._making:
            began = time.monotonic()
            if began >= self._good_until:
                self._text = generate_latest(self._present) + generate_latest(counted())
                ended = time.monotonic()
                self._good_until = ended + min(REST * (ended - began), MOST_REST_SECONDS)
            return self._text
