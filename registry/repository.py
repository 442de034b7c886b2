"""Records in Redis. Each change is one atomic compare-and-set that also writes its event."""

import contextlib
import functools
import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import redis
import structlog
from pydantic import ValidationError
from redis.client import Pipeline
from redis.lock import Lock

from fineserve.wire import Failure
from registry import metrics
from registry.errors import (
    IdempotencyConflict,
    IllegalTransition,
    QueueFull,
    RecordNotFound,
    Superseded,
)
from registry.events import MAX_EVENTS, stream_key
from registry.records import (
    GIVEN_UP,
    FamilyRecord,
    GenerationRecord,
    ModelRecord,
    Record,
    WorkerRecord,
    now,
)

log = structlog.get_logger()

R = TypeVar("R", bound=Record)
Command = tuple[str, ...]

PREFIX = "fineserve"
PAGE_RECORDS = 200
PACE_RECORDS = 32
"""So many of the last that were finished tell how fast the next will be."""
MAX_RETRY_SECONDS = 120
FAILURES = f"{PREFIX}:failures"
MAX_FAILURES = 20
IMAGES = f"{PREFIX}:images"
"""How many each model has made."""
STORE = f"{PREFIX}:store"
IDEMPOTENCY_SECONDS = 24 * 3600
EVENTS_SECONDS = 900
"""How long the events of what expires can be read after its end: they are most of what it takes."""
DEVICE_SECONDS = 6 * 3600
"""How long work waits for a worker of its class of device."""
DELETED_SECONDS = 24 * 3600
"""How long a deleted record still says so."""
FAMILY_SECONDS = 600
"""How long a family is known after the last worker that held it."""
COMPARE_AND_RUN = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
for place, limit in ipairs(cjson.decode(ARGV[3])) do
  if redis.call('ZCARD', limit[1]) >= limit[2] then return -1 - place end
end
for _, command in ipairs(cjson.decode(ARGV[2])) do redis.call(unpack(command)) end
return 1
"""
"""Commands (JSON), unless a key has no longer the value that it had (empty when there was none): 0;
or another key is there: -1; or the first, second … of some sets (JSON: key and size) is full:
-2, -3 …"""
DONE, HELD, FULL = 1, -1, -2
ID = re.compile(r"[a-z]-[0-9a-f]{16}")


@dataclass(frozen=True)
class Page(Generic[R]):
    items: list[R]
    next_offset: int | None


@dataclass(frozen=True)
class Room:
    """How many records may be unfinished at once; None is any number."""

    all: int | None = None
    of_owner: int | None = None


class Reason(NamedTuple):
    """Why what is begun once has failed, and the problem that it is, where it is a known one."""

    error: str
    problem: str | None


@dataclass(frozen=True)
class Claim(Generic[R]):
    """A record that a worker works on, and the lease that says so."""

    record: R
    lease: Lock


class Records(Generic[R]):
    """All records of one type.

    Keys: `…:NAME:ID` the record as JSON, `…:NAMEs` ids by age, `…:NAMEs:active` ids that are
    not finished, both also for each owner, `…:NAMEs:finished` when the last ones ended,
    `…:NAME:ID:events` the event stream, `…:NAME:ID:lease` who works on it.
    """

    def __init__(self, client: redis.Redis, record_type: type[R], ttl_seconds: int | None) -> None:
        self._redis = client
        self._type = record_type
        self.name = record_type.NAME
        self._ttl_seconds = ttl_seconds
        self._index = f"{PREFIX}:{record_type.NAME}s"
        self._active, self._finished = f"{self._index}:active", f"{self._index}:finished"
        self._compare_and_run = client.register_script(COMPARE_AND_RUN)

    def create(
        self,
        record: R,
        idempotency_key: str | None = None,
        body: str = "",
        room: Room = Room(),
    ) -> R:
        """Store a new record, or give back the one its owner made earlier with the same key.

        Raises IdempotencyConflict when the key came with another body, QueueFull.
        """
        if idempotency_key is None:
            self._commit(None, record, room)
            return record
        claim = f"{_digest(body)} {record.id}"
        seconds = min(IDEMPOTENCY_SECONDS, self._ttl_seconds or IDEMPOTENCY_SECONDS)
        key = self._idempotency(record.owner, idempotency_key)
        earlier = cast(str | None, self._redis.set(key, claim, nx=True, get=True, ex=seconds))
        if earlier is not None:
            # that request may still be on its way, or have died before it stored anything
            record = record.replace(id=_earlier_id(earlier, body, idempotency_key))

        while True:
            raw = self._raw(record.id)
            if raw is not None:
                return self._type.model_validate_json(raw)
            if self._commit(None, record, room):
                return record

    def require_room(self, owner: str, room: Room) -> None:
        """Raises QueueFull: a refusal that is cheap, since with many of them there is much to do.

        `create` alone keeps to the limits, whoever else creates one meanwhile.
        """
        for index, most in self._limits(owner, room):
            if int(self._redis.zcard(index)) >= most:
                raise self._full(index, most)

    def replay(self, owner: str, idempotency_key: str | None, body: str) -> R | None:
        """The record that a request of this owner with this key has made, if it has.

        Raises IdempotencyConflict when the key came with another body.
        """
        if idempotency_key is None:
            return None
        earlier = cast(str | None, self._redis.get(self._idempotency(owner, idempotency_key)))
        if earlier is None:
            return None
        with contextlib.suppress(RecordNotFound):
            return self.get(_earlier_id(earlier, body, idempotency_key))
        return None

    def get(self, record_id: str) -> R:
        """Raises RecordNotFound."""
        raw = self._raw(record_id) if ID.fullmatch(record_id) else None  # events' keys begin alike
        if raw is None:
            raise RecordNotFound(f"no {self._type.NAME} {record_id!r}")
        return self._type.model_validate_json(raw)

    def page(self, offset: int, limit: int, owner: str | None = None) -> Page[R]:
        """Newest first, of one owner or of all."""
        index = self._index if owner is None else _of(self._index, owner)
        ids = cast(list[str], self._redis.zrevrange(index, offset, offset + limit))
        more = len(ids) > limit
        raws = cast(list[str | None], self._redis.mget([self._key(i) for i in ids[:limit]] or [""]))
        records = [record for raw in raws if raw is not None if (record := self._readable(raw))]
        return Page(records, offset + limit if more else None)

    def _readable(self, raw: str) -> R | None:
        """One that is not must not hide the others."""
        try:
            return self._type.model_validate_json(raw)
        except ValidationError as error:
            log.error("a record that this version cannot read", record=raw[:200], error=str(error))
            return None

    def all(self, owner: str | None = None) -> Iterator[R]:
        """Newest first, and as many as there are; of one owner or of all."""
        offset: int | None = 0
        while offset is not None:
            page = self.page(offset, PAGE_RECORDS, owner)
            yield from page.items
            offset = page.next_offset

    def count_active(self) -> int:
        """How many are not finished."""
        return int(self._redis.zcard(self._active))

    def active(self) -> list[R]:
        """Records that are not finished, oldest first."""
        ids = cast(list[str], self._redis.zrange(self._active, 0, -1))
        raws = self._many([self._key(record_id) for record_id in ids])
        return [record for raw in raws if raw is not None if (record := self._readable(raw))]

    def unleased(self, records: Sequence[R]) -> list[R]:
        """Those that nobody works on."""
        leases = self._many([self._lease(record.id) for record in records])
        return [record for record, lease in zip(records, leases, strict=True) if lease is None]

    def _many(self, keys: Sequence[str]) -> list[str | None]:
        """Their values, so many at a time that Redis does not keep others waiting."""
        parts = (keys[i : i + PAGE_RECORDS] for i in range(0, len(keys), PAGE_RECORDS))
        return [raw for part in parts for raw in cast(list[str | None], self._redis.mget(part))]

    def change(
        self, record_id: str, *, attempt: int | None = None, known: R | None = None, **changes: Any
    ) -> R:
        """Set fields; a new `status` must be reachable. Writes a `status` event.

        With `attempt`, raises Superseded unless that attempt is still the current one and
        under way. `known` is what the record most likely is now, which saves reading it.
        Raises RecordNotFound, IllegalTransition.
        """

        return self.decide(record_id, lambda _: changes, attempt=attempt, known=known)

    def decide(
        self,
        record_id: str,
        changes_of: Callable[[R], dict[str, Any]],
        *,
        attempt: int | None = None,
        known: R | None = None,
    ) -> R:
        """`change`, where what is changed depends on what the record is by then."""

        def apply(record: R) -> R:
            changes = changes_of(record)
            if attempt is not None and (record.finished or record.attempts != attempt):
                raise Superseded(f"{record_id} is {record.status}, attempt {record.attempts}")
            status = changes.get("status", record.status)
            if status != record.status and status not in self._type.TRANSITIONS[record.status]:
                raise IllegalTransition(f"{record_id} is {record.status}, it cannot be {status}")
            return record.replace(**changes)

        return self._compare_and_set(record_id, apply, known)

    def tell(self, record_id: str, event: str, data: str) -> None:
        """Write an event (JSON)."""
        self._redis.xadd(
            stream_key(self._type.NAME, record_id),
            {"event": event, "data": data},
            maxlen=MAX_EVENTS,
        )

    def claim(self, record_id: str, max_attempts: int, lease_seconds: float) -> Claim[R] | None:
        """Begin work on a record: the next attempt, under a lease.

        None when there is nothing to do: it is finished, or another worker has it. A record
        whose attempts are used up becomes `failed`.
        """
        lease = self._redis.lock(self._lease(record_id), lease_seconds, thread_local=False)
        token = uuid.uuid4().hex
        while (raw := self._raw(record_id)) is not None:
            record = self._type.model_validate_json(raw)
            if record.finished:
                return None
            first = record.status == "queued"
            taken: list[Command] = []
            if record.attempts >= max_attempts:
                error = f"gave up after {record.attempts} attempts; the worker died in each"
                record = record.replace(status="failed", error=error)
            else:
                record = record.replace(status=self._type.STARTED, attempts=record.attempts + 1)
                taken.append(("SET", lease.name, token, "PX", str(round(lease_seconds * 1000))))
            outcome = self._run(raw, record, self._commands(record) + taken, absent=lease.name)
            if outcome == HELD:
                return None
            if outcome == DONE and record.finished:
                metrics.FINISHED.labels(self.name, record.status).inc()
                return None
            if outcome == DONE:
                lease.local.token = token.encode()  # what Lock.acquire would have set
                if first:
                    waited_seconds = (now() - record.created_at).total_seconds()
                    metrics.QUEUE_WAIT.labels(self.name).observe(waited_seconds)
                return Claim(record, lease)
        return None

    def leased(self, record_id: str) -> bool:
        return bool(self._redis.exists(self._lease(record_id)))

    def _compare_and_set(
        self, record_id: str, apply: Callable[[R], R], known: R | None = None
    ) -> R:
        if known is not None:
            with contextlib.suppress(Superseded, IllegalTransition):  # what it is now decides
                record = apply(known)
                if self._commit(known.model_dump_json(), record):
                    return self._counted(known, record)
        while True:
            raw = self._raw(record_id)
            if raw is None:
                raise RecordNotFound(f"no {self._type.NAME} {record_id!r}")
            before = self._type.model_validate_json(raw)
            record = apply(before)
            if self._commit(raw, record):
                return self._counted(before, record)

    def _counted(self, before: R, record: R) -> R:
        if record.finished and not before.finished:
            metrics.FINISHED.labels(self.name, record.status).inc()
        return record

    def _raw(self, record_id: str) -> str | None:
        return cast(str | None, self._redis.get(self._key(record_id)))

    def _commit(self, before: str | None, record: R, room: Room = Room()) -> bool:
        """Write a record and its event, unless it is no longer what it was before, or is new.

        Raises QueueFull when there is no room for another.
        """
        commands = self._commands(record)
        if before is None:
            commands += [
                ("ZADD", index, *self._by_age(record))
                for index in self._each(self._index, record.owner)
            ]
        limits = self._limits(record.owner, room)
        outcome = self._run(before, record, commands, limits=limits)
        if outcome <= FULL:
            raise self._full(*limits[FULL - outcome])
        return outcome == DONE

    def _limits(self, owner: str, room: Room) -> list[tuple[str, int]]:
        """Sets of unfinished records, and how many may be in each."""
        sets = zip(self._each(self._active, owner), (room.all, room.of_owner), strict=True)
        return [(index, most) for index, most in sets if most is not None]

    def _full(self, index: str, most: int) -> QueueFull:
        whose = "here" if index == self._active else "of yours"
        seconds = self._seconds_to_next()
        return QueueFull(
            f"{most} {self.name}s {whose} are not finished, as many as may be; "
            f"retry in {seconds} s",
            seconds,
        )

    def _seconds_to_next(self) -> int:
        """About when the next one will be finished, at the pace of the last ones."""
        ended = cast(list[str], self._redis.lrange(self._finished, 0, -1))
        pace = (time.time() - float(ended[-1])) / len(ended) if ended else 0
        return min(max(math.ceil(pace), 1), MAX_RETRY_SECONDS)

    def _run(
        self,
        before: str | None,
        record: R,
        commands: list[Command],
        absent: str | None = None,
        limits: Sequence[tuple[str, int]] = (),
    ) -> int:
        keys = [self._key(record.id), *([absent] if absent else [])]
        arguments = [before or "", json.dumps(commands), json.dumps(limits)]
        return int(self._compare_and_run(keys=keys, args=arguments))

    def _each(self, index: str, owner: str) -> tuple[str, str]:
        """The index of all, and that of the owner."""
        return index, _of(index, owner)

    def _commands(self, record: R) -> list[Command]:
        key, stream = self._key(record.id), stream_key(self._type.NAME, record.id)
        event = ("event", "status", "data", self._event(record))
        commands: list[Command] = [
            ("SET", key, record.model_dump_json()),
            ("XADD", stream, "MAXLEN", "~", str(MAX_EVENTS), "*", *event),
            *(
                ("ZREM", index, record.id)
                if record.finished
                else ("ZADD", index, *self._by_age(record))
                for index in self._each(self._active, record.owner)
            ),
        ]
        if record.finished and record.status not in GIVEN_UP:
            commands += [
                ("LPUSH", self._finished, str(time.time())),
                ("LTRIM", self._finished, "0", str(PACE_RECORDS - 1)),
            ]
        if record.finished:  # here, since a release of its own would be one more write to disk
            commands.append(("DEL", self._lease(record.id)))
        kept_seconds = self._ttl_seconds if record.finished else None
        if record.status == "failed":
            failure = Failure(kind=self.name, id=record.id, error=record.error or "", at=now())
            commands += [
                ("LPUSH", FAILURES, failure.model_dump_json()),
                ("LTRIM", FAILURES, "0", str(MAX_FAILURES - 1)),
            ]
        if isinstance(record, GenerationRecord) and record.status == "done":
            commands.append(("HINCRBY", IMAGES, record.model, str(len(record.seeds))))
        if record.status == "deleted":
            kept_seconds = DELETED_SECONDS
            commands.append(("HDEL", IMAGES, record.id))
        if kept_seconds is not None:
            events_seconds = min(kept_seconds, EVENTS_SECONDS)
            commands.append(("EXPIRE", key, str(kept_seconds)))
            commands.append(("EXPIRE", stream, str(events_seconds)))
            commands += [
                ("ZREM", index, record.id) for index in self._each(self._index, record.owner)
            ]
        return commands

    def _by_age(self, record: R) -> tuple[str, str]:
        return str(record.created_at.timestamp()), record.id

    def _event(self, record: R) -> str:
        fields = {"status", "revision", "attempts", "error"}
        return record.model_dump_json(include=fields)

    def _key(self, record_id: str) -> str:
        return f"{PREFIX}:{self._type.NAME}:{record_id}"

    def _idempotency(self, owner: str, idempotency_key: str) -> str:
        return f"{PREFIX}:idempotency:{self._type.NAME}:{owner}:{idempotency_key}"

    def _lease(self, record_id: str) -> str:
        return f"{self._key(record_id)}:lease"


class Repository:
    """Everything in Redis that is not the broker's."""

    def __init__(self, client: redis.Redis, generation_ttl_seconds: int) -> None:
        self._redis = client
        self.models: Records[ModelRecord] = Records(client, ModelRecord, None)
        self.generations: Records[GenerationRecord] = Records(
            client, GenerationRecord, generation_ttl_seconds
        )

    def announce_family(self, family: FamilyRecord) -> None:
        """Known for FAMILY_SECONDS: workers repeat it."""
        self._announce("family", family.name, family.model_dump_json(), FAMILY_SECONDS)

    def families(self) -> list[FamilyRecord]:
        """What workers hold or held a short while ago, by name."""
        found = [_family(raw) for raw in self._announced("family")]
        return sorted(found, key=lambda family: family.name)

    def family(self, name: str) -> FamilyRecord | None:
        raw = cast(str | None, self._redis.get(f"{PREFIX}:family:{name}"))
        return None if raw is None else _family(raw)

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
        return [Failure.model_validate_json(raw) for raw in raws]

    def images_made(self, models: Sequence[str]) -> dict[str, int]:
        """Images that each of these models has made, by its id; those that made any."""
        made = cast(list[str | None], self._redis.hmget(IMAGES, [*models])) if models else []
        return {model: int(n) for model, n in zip(models, made, strict=True) if n is not None}

    def memory_bytes(self) -> int:
        """What Redis holds."""
        return int(self._redis.info("memory")["used_memory"])

    def announce_store(self, used_bytes: dict[str, int]) -> None:
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

    def heartbeat(self, worker: WorkerRecord, seconds: float) -> None:
        self._announce("worker", worker.id, worker.model_dump_json(), seconds)
        self._redis.set(_seen(worker.queue, worker.device_class), "1", ex=DEVICE_SECONDS)

    def served(self, queue: str, device_class: str) -> bool:
        """Whether a worker of this queue and device class lived within DEVICE_SECONDS."""
        return bool(self._redis.exists(_seen(queue, device_class)))

    def take_back_heartbeat(self, worker_id: str) -> None:
        """Of a worker that ends: nobody is to wait for it until its heartbeat expires."""
        self._redis.delete(f"{PREFIX}:worker:{worker_id}")

    def workers(self) -> list[WorkerRecord]:
        return [WorkerRecord.model_validate_json(raw) for raw in self._announced("worker")]

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

    def once(self, name: str, seconds: float) -> bool:
        """True for the first of many workers that asks within `seconds`."""
        return bool(self._redis.set(_once(name), "1", nx=True, px=int(seconds * 1000)))

    def fail_once(self, name: str, reason: Reason, seconds: float) -> None:
        """What the first one began has failed: for `seconds` others are told why, then one of them
        may begin again."""
        self._redis.set(_failed(name), json.dumps(reason), px=int(seconds * 1000))
        self._redis.delete(_once(name))

    def failure_of(self, name: str) -> Reason | None:
        raw = cast(str | None, self._redis.get(_failed(name)))
        return None if raw is None else Reason(*json.loads(raw))


@functools.lru_cache(maxsize=64)
def _family(raw: str) -> FamilyRecord:
    """It is long, asked for with every request, and nearly always the same."""
    return FamilyRecord.model_validate_json(raw)


def _once(name: str) -> str:
    return f"{PREFIX}:once:{name}"


def _failed(name: str) -> str:
    return f"{PREFIX}:failed:{name}"


def _seen(queue: str, device_class: str) -> str:
    return f"{PREFIX}:seen:{queue}:{device_class}"


def _of(index: str, owner: str) -> str:
    return f"{index}:of:{owner}"


def _profile_key(device_class: str, family: str) -> str:
    return f"{PREFIX}:profile:{device_class}:{family}"


def _step_costs_key(device_class: str, family: str) -> str:
    return f"{PREFIX}:step-costs:{device_class}:{family}"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _earlier_id(claim: str, body: str, idempotency_key: str) -> str:
    """The record's id in what is kept under a key. Raises IdempotencyConflict."""
    digest, _, record_id = claim.partition(" ")
    if digest != _digest(body):
        raise IdempotencyConflict(
            f"Idempotency-Key {idempotency_key!r} was used for another request"
        )
    return record_id


def connect(redis_url: str) -> redis.Redis:
    """A client that answers in text and gives up on a silent server after some seconds."""
    return redis.Redis.from_url(
        redis_url, decode_responses=True, socket_timeout=10, socket_connect_timeout=3
    )
