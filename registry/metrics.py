"""Counters and histograms of every process, for Prometheus; `service.metrics` has the gauges.

They live in the process that counts. Where `PROMETHEUS_MULTIPROC_DIR` is set they are files in it,
and whoever answers `/metrics` sums those of all processes on its host.
"""

import fcntl
import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import IO

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector

NAMESPACE = "fineserve"
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
SHORT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LONG_SECONDS = (0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
STEP_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0)
QUALITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
LOSSES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


def place(directory: Path) -> str:
    """Name of the files that this process counts into: of one of few places, which is its own
    while it lives. A process that ends leaves its place, and what it counted, to a later one.
    """
    for number in itertools.count():
        lock = (directory / f"place-{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _PLACES.append(lock)
        return f"place-{number}"
    raise AssertionError("there are always more numbers")


_PLACES: list[IO[str]] = []
"""Locks of this process, held as long as it lives."""
if MULTIPROCESS_VARIABLE in os.environ:  # before there is any metric
    _own = functools.cache(lambda _: place(Path(os.environ[MULTIPROCESS_VARIABLE])))
    values.ValueClass = values.MultiProcessValue(lambda: _own(os.getpid()))


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(name, what, labels, namespace=NAMESPACE)


def _histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(name, what, labels, namespace=NAMESPACE, buckets=buckets)


PLANS = _counter("plans_total", "Budgets planned, by outcome.", "outcome")
FINISHED = _counter("finished_total", "Finished records, by outcome.", "kind", "outcome")
QUEUE_WAIT = _histogram(
    "queue_wait_seconds", "Time from acceptance to the first attempt.", SHORT_SECONDS, "kind"
)

BUILD_PHASE = _histogram(
    "build_phase_seconds", "Time that builds spent in a phase.", LONG_SECONDS, "phase"
)
MEASURED_RATIO = _histogram(
    "measured_over_predicted_ratio", "Measured over predicted cost of models.", RATIOS, "quantity"
)
RETRAINING_LOSS = _histogram(
    "retraining_heldout_loss", "Held-out loss before and after retraining.", LOSSES, "when"
)

IMAGES = _counter("images_total", "Images made, by depth of their model.", "depth")

PROMISES = _counter("promises_total", "Elastic requests, by what came of their promise.", "outcome")
ELASTIC_QUALITY = _histogram(
    "elastic_quality", "Quality of what elastic requests were served by.", QUALITIES
)

STEP = _histogram("engine_step_seconds", "Time of one step of a whole batch.", STEP_SECONDS)
BATCH_ROWS = _histogram("engine_batch_rows", "Rows in a batch, at each composition.", SIZES)
BATCH_MODELS = _histogram("engine_batch_models", "Models in a batch, at each composition.", SIZES)
COMPILE = _histogram("engine_compile_seconds", "Time to compile one graph.", LONG_SECONDS)
LOOKUPS = _counter("engine_lookups_total", "Cache lookups, by outcome.", "cache", "outcome")
EVICTIONS = _counter("engine_evictions_total", "Entries evicted for want of memory.", "what")

for _counted, *_labels in (
    (PLANS, "solved"),
    (PLANS, "infeasible"),
    (PLANS, "impossible"),
    (FINISHED, "model", "ready"),
    (FINISHED, "model", "failed"),
    (FINISHED, "generation", "done"),
    (FINISHED, "generation", "failed"),
    (PROMISES, "kept"),
    (PROMISES, "missed"),
    (PROMISES, "refused"),
    (LOOKUPS, "model", "hit"),
    (LOOKUPS, "modulations", "hit"),
    (EVICTIONS, "model"),
    (EVICTIONS, "materialised"),
    (EVICTIONS, "modulations"),
):
    _counted.labels(*_labels)  # starts at 0, else the first of each would not be an increase

WORKER_GAUGES = {
    "device_held_bytes": "Memory that the sampling engine holds on its device.",
    "device_budget_bytes": "Memory that the sampling engine may hold.",
    "engine_models": "Models that the sampling engine has on its device.",
    "engine_running": "Parts of requests that take part in the present steps.",
    "engine_waiting": "Parts of requests that wait for room or their turn.",
    "elastic_depth": "Mean depth that the last elastic requests were served by.",
    "elastic_rate": "Elastic requests a second that were served in the last seconds.",
    "engine_slowdown_ratio": "Time of steps with all between them, over what was measured.",
    "engine_compiled": "Share of what the sampling engine is to run compiled that it does.",
    "process_resident_bytes": "Resident memory of a worker.",
}
"""Names and meanings of the gauges in each worker's heartbeat."""


def registry() -> CollectorRegistry:
    """Registry of everything that the processes of this host have counted."""
    if MULTIPROCESS_VARIABLE not in os.environ:
        return REGISTRY
    together = CollectorRegistry()
    MultiProcessCollector(together)
    return together


@contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Observe the seconds that the block takes, unless it raises."""
    started = perf_counter()
    yield
    histogram.observe(perf_counter() - started)
