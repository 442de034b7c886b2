"""Records of one type, in Redis. Each change is one atomic compare-and-set that also writes its
event."""

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import redis
from redis.lock import Lock

from fineserve.wire import Failure
from registry import metrics
from registry.errors import IllegalTransition, QueueFull, RecordNotFound, Superseded
from registry.events import MAX_EVENTS, stream_key
from registry.idempotency import IdempotencyKeys
from registry.records import GIVEN_UP, GenerationRecord, Record, now, readable

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
EVENTS_SECONDS = 900
"""How long the events of what expires can be read after its end: they are most of what it takes."""
DELETED_SECONDS = 24 * 3600
"""How long a deleted record still says so."""
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
        self._keys = IdempotencyKeys(client, f"{PREFIX}:idempotency:{self.name}", ttl_seconds)
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
        # an earlier request may still be on its way, or have died before it stored anything
        record_id = self._keys.take(record.owner, idempotency_key, body, record.id)
        record = record.replace(id=record_id)
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
        record_id = self._keys.find(owner, idempotency_key, body)
        if record_id is not None:
            with contextlib.suppress(RecordNotFound):
                return self.get(record_id)
        return None

    def get(self, record_id: str) -> R:
        """Raises RecordNotFound."""
        raw = self._raw(record_id) if ID.fullmatch(record_id) else None  # events' keys begin alike
        if raw is None:
            raise RecordNotFound(f"no {self._type.NAME} {record_id!r}")
        return self._type.model_validate_json(raw)

    def page(self, offset: int, limit: int, owner: str | None = None) -> Page[R]:
        """Newest first, of one owner or of all."""
        index = self._index if owner is None else _owned(self._index, owner)
        ids = cast(list[str], self._redis.zrevrange(index, offset, offset + limit))
        more = len(ids) > limit
        return Page(self._readable(ids[:limit]), offset + limit if more else None)

    def _readable(self, ids: Sequence[str]) -> list[R]:
        raws = self._many([self._key(record_id) for record_id in ids])
        return [record for raw in raws if raw and (record := readable(self._type, raw))]

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
        return self._readable(ids)

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
        return index, _owned(index, owner)

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

    def _lease(self, record_id: str) -> str:
        return f"{self._key(record_id)}:lease"


def _owned(index: str, owner: str) -> str:
    return f"{index}:of:{owner}"
