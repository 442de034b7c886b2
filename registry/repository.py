"""Everything in Redis that service and workers share."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import redis
from redis.client import Pipeline
from redis.lock import Lock

from fineserve.wire import Failure
from registry.announcements import Announcements
from registry.lifecycle import FAILURES, IMAGES, PREFIX, Records
from registry.records import GenerationRecord, ModelRecord, readable

STORE = f"{PREFIX}:store"


class Reason(NamedTuple):
    """Why what is begun once has failed, and the problem that it is, where it is a known one."""

    error: str
    problem: str | None


class Repository(Announcements):
    """Everything in Redis that is not the broker's."""

    def __init__(self, client: redis.Redis, generation_ttl_seconds: int) -> None:
        super().__init__(client)
        self.models: Records[ModelRecord] = Records(client, ModelRecord, None)
        self.generations: Records[GenerationRecord] = Records(
            client, GenerationRecord, generation_ttl_seconds
        )

    def profile(self, device_class: str, family: str) -> str | None:
        """What sizing knows of a family on a class of device, as JSON."""
        return cast(str | None, self._redis.get(_profile_key(device_class, family)))

    def profiled_classes(self, family: str) -> list[str]:
        """The device classes on which a family was profiled."""
        return sorted(cast(set[str], self._redis.smembers(f"{PREFIX}:profiles:{family}")))

    def change_profile(
        self, device_class: str, family: str, apply: Callable[[str | None], str]
    ) -> None:
        """One atomic compare-and-set; `apply` may be called again when another was first."""
        key = _profile_key(device_class, family)

        def transaction(pipe: Pipeline) -> None:
            changed = apply(cast(str | None, pipe.get(key)))
            pipe.multi()
            pipe.set(key, changed)
            pipe.sadd(f"{PREFIX}:profiles:{family}", device_class)

        self._redis.transaction(cast(Any, transaction), key)

    def step_costs(self, device_class: str, family: str, compute: str) -> str | None:
        """What the engine measured of a family in one dtype on a class of device, as JSON."""
        key = _step_costs_key(device_class, family)
        return cast(str | None, self._redis.hget(key, compute))

    def keep_step_costs(self, device_class: str, family: str, compute: str, content: str) -> None:
        self._redis.hset(_step_costs_key(device_class, family), compute, content)

    def forget_step_costs(self, device_class: str, family: str) -> None:
        self._redis.delete(_step_costs_key(device_class, family))

    def failures(self) -> list[Failure]:
        """The last ones, newest first."""
        raws = cast(list[str], self._redis.lrange(FAILURES, 0, -1))
        return [failure for raw in raws if (failure := readable(Failure, raw))]

    def images_made(self, models: Sequence[str]) -> dict[str, int]:
        """Images that each of these models has made, by its id; those that made any."""
        made = cast(list[str | None], self._redis.hmget(IMAGES, [*models])) if models else []
        return {model: int(n) for model, n in zip(models, made, strict=True) if n is not None}

    def memory_bytes(self) -> int:
        """What Redis holds."""
        return int(self._redis.info("memory")["used_memory"])

    def keep_store_bytes(self, used_bytes: dict[str, int]) -> None:
        """What the artifacts take, by kind."""
        self._redis.set(STORE, json.dumps(used_bytes))

    def store_bytes(self) -> dict[str, int]:
        """As a worker has counted a minute ago; empty before the first has."""
        return cast(dict[str, int], json.loads(cast(str | None, self._redis.get(STORE)) or "{}"))

    def memory_share(self) -> float:
        """Of what Redis may hold; 0 where it may hold anything."""
        memory = self._redis.info("memory")
        most = int(memory["maxmemory"])
        return int(memory["used_memory"]) / most if most else 0.0

    def lock(self, name: str, seconds: float) -> Lock:
        """Waits for whoever has it; it is free again after `seconds` at the latest."""
        lock: Lock = self._redis.lock(f"{PREFIX}:lock:{name}", seconds, thread_local=False)
        return lock

    def once(self, name: str, seconds: float) -> bool:
        """True for the first of many workers that asks within `seconds`."""
        return bool(self._redis.set(_once_key(name), "1", nx=True, px=int(seconds * 1000)))

    def fail_once(self, name: str, reason: Reason, seconds: float) -> None:
        """What the first one began has failed: for `seconds` others are told why, then one of them
        may begin again."""
        self._redis.set(_failed_key(name), json.dumps(reason), px=int(seconds * 1000))
        self._redis.delete(_once_key(name))

    def failure_of(self, name: str) -> Reason | None:
        raw = cast(str | None, self._redis.get(_failed_key(name)))
        return None if raw is None else Reason(*json.loads(raw))


def _once_key(name: str) -> str:
    return f"{PREFIX}:once:{name}"


def _failed_key(name: str) -> str:
    return f"{PREFIX}:failed:{name}"


def _profile_key(device_class: str, family: str) -> str:
    return f"{PREFIX}:profile:{device_class}:{family}"


def _step_costs_key(device_class: str, family: str) -> str:
    return f"{PREFIX}:step-costs:{device_class}:{family}"


def connect(redis_url: str) -> redis.Redis:
    """A client that answers in text and gives up on a silent server after some seconds."""
    return redis.Redis.from_url(
        redis_url, decode_responses=True, socket_timeout=10, socket_connect_timeout=3
    )
