"""How many queued requests a worker takes and keeps, while others could work on them."""

import threading
from collections.abc import Callable, Mapping

from registry.queue import SAMPLE_QUEUE
from registry.records import WorkerRecord
from worker.runtime import Runtime

LEAST = 8
"""Requests that a worker takes in any case, so that it has some for its next batch."""


class Room:
    """Room for requests beside those that run.

    One worker alone takes what there is, and its engine is fair to those who wait. Of several each
    takes as many more as it runs; what one took before the next was there it gives back.
    """

    def __init__(self, runtime: Runtime, gauges: Callable[[], Mapping[str, float]]) -> None:
        """`gauges`: the engine's own, as they are now."""
        self._runtime, self._gauges = runtime, gauges
        self._shared = runtime.settings.workers_on_demand  # the queue tells how many are needed
        self._to_give, self._giving = 0, threading.Lock()

    def look_around(self) -> None:
        """See who else works on this queue; with every heartbeat."""
        others = [worker for worker in self._runtime.repository.workers() if self._is_peer(worker)]
        self._shared = bool(others) or self._runtime.settings.workers_on_demand
        idle = any(not (w.gauges.get("engine_running") or 0) for w in others)
        waiting = int(self._gauges().get("engine_waiting", 0))
        with self._giving:
            self._to_give = (waiting + 1) // 2 if idle else 0

    def _is_peer(self, worker: WorkerRecord) -> bool:
        ours = self._runtime
        return (
            worker.queue == SAMPLE_QUEUE
            and worker.device_class == ours.device_class
            and worker.id != ours.worker_id
        )

    def for_another(self, taken: int) -> bool:
        """Whether one more request is to be taken beside so many that were and are not done."""
        running = int(self._gauges().get("engine_running", 0))
        return not self._shared or taken < max(LEAST, 2 * running)

    def gives_back(self) -> bool:
        """Whether one request that waits is to go back to the queue, where somebody has nothing
        to do. Any thread may ask."""
        with self._giving:
            self._to_give -= 1
            return self._to_give >= 0
