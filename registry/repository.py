"""Everything in Redis that service and workers share, the broker's messages apart."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import redis
from redis.client import Pipeline
from redis.lock import Lock

from fineserve.wire import Failure
from registry.address import RedisAddress
from registry.events import redis_key
from registry.lifecycle import FAILURES, IMAGES, Records
from registry.records import FamilyRecord, GenerationRecord, ModelRecord, WorkerRecord, readable

STORE = redis_key("store")
SEEN = "seen"
"""Kind of announcements of the last worker of each queue and class of device."""
DEVICE_SECONDS = 6 * 3600
"""Seconds that work waits for a worker of its class of device."""
DISTURBANCE_SECONDS = 60
TIMEOUTS = {"socket_timeout": 10.0, "socket_connect_timeout": 3.0}
FAMILY_SECONDS = 600
"""Seconds that a family is known after the last worker that held it."""
ON_DEMAND_SECONDS = 30 * 24 * 3600
"""Seconds for both, where workers come and go with their work."""


class Reason(NamedTuple):
    """Reason why work that is begun once has failed, with the kind of a known problem."""

    error: str
    problem: str | None


class Repository:
    """Records, and what workers announce: their heartbeats, families, profiles and counts.

    Announcements expire unless they are repeated. Another release may have written them: those
    that cannot be read are left out.
    """

    def __init__(
        self, client: redis.Redis, generation_ttl_seconds: int, *, workers_on_demand: bool = False
    ) -> None:
        self._redis = client
        self._on_demand = workers_on_demand
        self.device_seconds = ON_DEMAND_SECONDS if workers_on_demand else DEVICE_SECONDS
        self.models: Records[ModelRecord] = Records(client, ModelRecord, None)
        self.generations: Records[GenerationRecord] = Records(
            client, GenerationRecord, generation_ttl_seconds
        )

    def announce_family(self, family: FamilyRecord) -> None:
        """Make a family known for FAMILY_SECONDS, or ON_DEMAND_SECONDS."""
        seconds = ON_DEMAND_SECONDS if self._on_demand else FAMILY_SECONDS
        self._announce("family", family.name, family.model_dump_json(), seconds)

    def families(self) -> list[FamilyRecord]:
        """Families that workers hold or held a short while ago, by name."""
        found = [family for raw in self._announced("family") if (family := _family(raw))]
        return sorted(found, key=lambda family: family.name)

    def family(self, name: str) -> FamilyRecord | None:
        raw = self._text(redis_key("family", name))
        return None if raw is None else _family(raw)

    def heartbeat(self, worker: WorkerRecord, seconds: float) -> None:
        content = worker.model_dump_json()
        self._announce("worker", worker.id, content, seconds)
        self._announce(SEEN, f"{worker.queue}:{worker.device_class}", content, self.device_seconds)

    def served(self, queue: str, device_class: str) -> bool:
        """Whether a worker of this queue and device class lived within `device_seconds`."""
        return bool(self._redis.exists(redis_key(SEEN, f"{queue}:{device_class}")))

    def take_back_heartbeat(self, worker_id: str) -> None:
        """Forget a worker that ends, so that nobody waits until its heartbeat expires."""
        self._redis.delete(redis_key("worker", worker_id))

    def workers(self) -> list[WorkerRecord]:
        """Workers that live."""
        return self._workers("worker")

    def expected_workers(self, live: list[WorkerRecord] | None = None) -> list[WorkerRecord]:
        """Workers that live, read unless they are given; and, where they come on demand, the last
        of each kind that did."""
        live = self.workers() if live is None else live
        if not self._on_demand:
            return live
        kinds = {(worker.queue, worker.device_class) for worker in live}
        seen = self._workers(SEEN)
        return live + [each for each in seen if (each.queue, each.device_class) not in kinds]

    def _workers(self, kind: str) -> list[WorkerRecord]:
        raws = self._announced(kind)
        return [worker for raw in raws if (worker := _worker(raw))]

    def _announce(self, kind: str, name: str, content: str, seconds: float) -> None:
        with self._redis.pipeline() as pipe:
            pipe.set(redis_key(kind, name), content, px=int(seconds * 1000))
            pipe.zadd(redis_key(kind, "announced"), {name: 0})
            pipe.execute()

    def _announced(self, kind: str) -> list[str]:
        index = redis_key(kind, "announced")
        names = cast(list[str], self._redis.zrange(index, 0, -1))
        keys = [redis_key(kind, name) for name in names]
        raws = cast(list[str | None], self._redis.mget(keys)) if keys else []
        # Redis's own clock decides what has expired: those of hosts differ
        if expired := [name for name, raw in zip(names, raws, strict=True) if raw is None]:
            self._redis.zrem(index, *expired)
        return [raw for raw in raws if raw is not None]

    def profile(self, device_class: str, family: str) -> str | None:
        """Profile of a family on a class of device, as JSON."""
        return self._text(redis_key("profile", device_class, family))

    def profiled_classes(self, family: str) -> list[str]:
        """Device classes on which a family was profiled."""
        return sorted(cast(set[str], self._redis.smembers(redis_key("profiles", family))))

    def change_profile(
        self, device_class: str, family: str, apply: Callable[[str | None], str]
    ) -> None:
        """Change a profile atomically; `apply` is called again when another change was first."""
        key = redis_key("profile", device_class, family)

        def transaction(pipe: Pipeline) -> None:
            changed = apply(cast(str | None, pipe.get(key)))
            pipe.multi()
            pipe.set(key, changed)
            pipe.sadd(redis_key("profiles", family), device_class)

        self._redis.transaction(cast(Any, transaction), key)

    def step_costs(self, device_class: str, family: str, compute: str) -> str | None:
        """Measurements of the engine for a family in one dtype on a class of device, as JSON."""
        key = redis_key("step-costs", device_class, family)
        return cast(str | None, self._redis.hget(key, compute))

    def keep_step_costs(self, device_class: str, family: str, compute: str, content: str) -> None:
        self._redis.hset(redis_key("step-costs", device_class, family), compute, content)

    def tell_disturbance(self, generation_id: str, what: str) -> None:
        """Tell who times a generation what else used its device; empty for nothing."""
        self._redis.set(redis_key("disturbance", generation_id), what, ex=DISTURBANCE_SECONDS)

    def disturbance(self, generation_id: str) -> str | None:
        """What was told of a generation; None while nothing is."""
        return self._text(redis_key("disturbance", generation_id))

    def failures(self) -> list[Failure]:
        """Last failures, newest first."""
        raws = cast(list[str], self._redis.lrange(FAILURES, 0, -1))
        return [failure for raw in raws if (failure := readable(Failure, raw))]

    def images_made(self, models: Sequence[str]) -> dict[str, int]:
        """Images that each of these models has made, by its id; those that made any."""
        made = cast(list[str | None], self._redis.hmget(IMAGES, [*models])) if models else []
        return {model: int(n) for model, n in zip(models, made, strict=True) if n is not None}

    def memory_bytes(self) -> int:
        """Bytes that Redis holds."""
        return int(self._redis.info("memory")["used_memory"])

    def memory_share(self) -> float:
        """Share in use of the memory that Redis may hold; 0 where there is no limit."""
        memory = self._redis.info("memory")
        most = int(memory["maxmemory"])
        return int(memory["used_memory"]) / most if most else 0.0

    def keep_store_bytes(self, used_bytes: dict[str, int]) -> None:
        """Keep the bytes that artifacts take, by kind."""
        self._redis.set(STORE, json.dumps(used_bytes))

    def store_bytes(self) -> dict[str, int]:
        """Bytes that artifacts took a minute ago, by kind; empty until a worker has counted."""
        return cast(dict[str, int], json.loads(self._text(STORE) or "{}"))

    def try_to_write(self) -> None:
        """Raise RedisError where what is accepted now could not be kept."""
        self._redis.set(redis_key("probe"), "1", px=60_000)

    def lock(self, name: str, seconds: float) -> Lock:
        """A lock that waits for its holder, and is free again after `seconds` at the latest."""
        lock: Lock = self._redis.lock(redis_key("lock", name), seconds, thread_local=False)
        return lock

    def want(self, name: str, seconds: float) -> None:
        """Tell who holds a lock, for `seconds`, that another waits for it."""
        self._redis.set(redis_key("wanted", name), "1", px=int(seconds * 1000))

    def wanted(self, name: str) -> bool:
        """Whether somebody waits for a lock."""
        return bool(self._redis.exists(redis_key("wanted", name)))

    def once(self, name: str, seconds: float) -> bool:
        """Whether the caller is the first of many that asks within `seconds`."""
        return bool(self._redis.set(redis_key("once", name), "1", nx=True, px=int(seconds * 1000)))

    def fail_once(self, name: str, reason: Reason, seconds: float) -> None:
        """Tell others for `seconds` why work begun `once` has failed; then it may begin again."""
        key = redis_key("failed", name)
        self._redis.set(key, json.dumps(reason), px=int(seconds * 1000))
        self._redis.delete(redis_key("once", name))

    def failure_of(self, name: str) -> Reason | None:
        raw = self._text(redis_key("failed", name))
        return None if raw is None else Reason(*json.loads(raw))

    def _text(self, key: str) -> str | None:
        return cast(str | None, self._redis.get(key))


@functools.lru_cache(maxsize=64)
def _family(raw: str) -> FamilyRecord | None:
    """Family of its JSON: long, asked for with every request, and nearly always the same."""
    return readable(FamilyRecord, raw)


@functools.lru_cache(maxsize=256)
def _worker(raw: str) -> WorkerRecord | None:
    """Worker of its heartbeat, which is asked for with every request, too."""
    return readable(WorkerRecord, raw)


def connect(redis_url: str) -> redis.Redis:
    """A client that answers in text and gives up on a silent server after some seconds."""
    return RedisAddress.of(redis_url).connect(decode_responses=True, **TIMEOUTS)
