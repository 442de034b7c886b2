"""What workers tell of themselves and of the families they hold; it expires unless it is repeated.

Another release may have written it: what cannot be read is left out.
"""

import functools
from typing import cast

import redis

from registry.lifecycle import PREFIX
from registry.records import FamilyRecord, WorkerRecord, readable

DEVICE_SECONDS = 6 * 3600
"""How long work waits for a worker of its class of device."""
FAMILY_SECONDS = 600
"""How long a family is known after the last worker that held it."""


class Announcements:
    """Workers by their heartbeats, and families."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def announce_family(self, family: FamilyRecord) -> None:
        """Known for FAMILY_SECONDS: workers repeat it."""
        self._announce("family", family.name, family.model_dump_json(), FAMILY_SECONDS)

    def families(self) -> list[FamilyRecord]:
        """What workers hold or held a short while ago, by name."""
        found = [family for raw in self._announced("family") if (family := _family(raw))]
        return sorted(found, key=lambda family: family.name)

    def family(self, name: str) -> FamilyRecord | None:
        raw = cast(str | None, self._redis.get(f"{PREFIX}:family:{name}"))
        return None if raw is None else _family(raw)

    def heartbeat(self, worker: WorkerRecord, seconds: float) -> None:
        self._announce("worker", worker.id, worker.model_dump_json(), seconds)
        self._redis.set(_served_key(worker.queue, worker.device_class), "1", ex=DEVICE_SECONDS)

    def served(self, queue: str, device_class: str) -> bool:
        """Whether a worker of this queue and device class lived within DEVICE_SECONDS."""
        return bool(self._redis.exists(_served_key(queue, device_class)))

    def take_back_heartbeat(self, worker_id: str) -> None:
        """A worker ends: nobody is to wait for it until its heartbeat expires."""
        self._redis.delete(f"{PREFIX}:worker:{worker_id}")

    def workers(self) -> list[WorkerRecord]:
        raws = self._announced("worker")
        return [worker for raw in raws if (worker := readable(WorkerRecord, raw))]

    def _announce(self, kind: str, name: str, content: str, seconds: float) -> None:
        with self._redis.pipeline() as pipe:
            pipe.set(f"{PREFIX}:{kind}:{name}", content, px=int(seconds * 1000))
            pipe.zadd(f"{PREFIX}:{kind}:announced", {name: 0})
            pipe.execute()

    def _announced(self, kind: str) -> list[str]:
        index = f"{PREFIX}:{kind}:announced"
        names = cast(list[str], self._redis.zrange(index, 0, -1))
        keys = [f"{PREFIX}:{kind}:{name}" for name in names]
        raws = cast(list[str | None], self._redis.mget(keys)) if keys else []
        # Redis's own clock decides what has expired: those of hosts differ
        if expired := [name for name, raw in zip(names, raws, strict=True) if raw is None]:
            self._redis.zrem(index, *expired)
        return [raw for raw in raws if raw is not None]


@functools.lru_cache(maxsize=64)
def _family(raw: str) -> FamilyRecord | None:
    """It is long, asked for with every request, and nearly always the same."""
    return readable(FamilyRecord, raw)


def _served_key(queue: str, device_class: str) -> str:
    return f"{PREFIX}:seen:{queue}:{device_class}"
