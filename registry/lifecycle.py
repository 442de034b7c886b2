"""Records of one type in Redis: each change is an atomic compare-and-set that writes its event."""

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import redis
from redis.exceptions import LockError
from redis.lock import Lock

from fineserve.wire import Failure
from registry import metrics
from registry.errors import (
    IllegalTransition,
    QueueFull,
    RecordNotFound,
    RecordUnreadable,
    Superseded,
)
from registry.events import MAX_EVENTS, redis_key, stream_key
from registry.idempotency import IdempotencyKeys
from registry.records import GIVEN_UP, REFUSED, GenerationRecord, Record, now, readable

R = TypeVar("R", bound=Record)
Command = tuple[str, ...]
Limits = Sequence[tuple[str, int]]

PAGE_RECORDS = 200
PACE_RECORDS = 32
"""Records finished last whose pace tells how soon the next one will be."""
MAX_RETRY_SECONDS = 120
FAILURES = redis_key("failures")
MAX_FAILURES = 20
IMAGES = redis_key("images")
"""Key of the number of images that each model has made."""
EVENTS_SECONDS = 900
"""Seconds that events, most of what a record takes, outlast the end of one that expires."""
GIVEN_UP_SECONDS = 7 * 24 * 3600
"""Seconds that a record of what failed or was cancelled is kept, where others stay."""
DELETED_SECONDS = 24 * 3600
"""Seconds that a deleted record still says so."""
COMPARE_AND_RUN = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
for place, limit in ipairs(cjson.decode(ARGV[3])) do
  if redis.call('ZCARD', limit[1]) >= limit[2] then return -1 - place end
end
for _, command in ipairs(cjson.decode(ARGV[2])) do redis.call(unpack(command)) end
return 1
"""
"""Lua script that runs commands (JSON) and returns 1, unless a key has no longer the value that it
had (empty for none): 0; another key is there: -1; or the first, second … of some sets (JSON: key
and size) is full: -2, -3 …"""
DONE, HELD, FULL = 1, -1, -2
ID = re.compile(r"[a-z]-[0-9a-f]{16}")


class Page(NamedTuple, Generic[R]):
    items: list[R]
    next_offset: int | None


@dataclass(frozen=True)
class Room:
    """Number of records that may be unfinished at once; None is any number."""

    all: int | None = None
    of_owner: int | None = None


class Claim(NamedTuple, Generic[R]):
    """A record that a worker works on, and the lease that keeps others off."""

    record: R
    lease: Lock


class Records(Generic[R]):
    """All records of one type.

    Keys: `…:NAME:ID` has the record as JSON; `…:NAMEs` ids by age and `…:NAMEs:active` ids of
    unfinished records, both also for each owner; `…:NAMEs:finished` when the last ones ended;
    `…:NAME:ID:events` the event stream, `…:NAME:ID:lease` the worker's token.
    """

    def __init__(self, client: redis.Redis, record_type: type[R], ttl_seconds: int | None) -> None:
        self._redis = client
        self._type = record_type
        self.name = record_type.NAME
        self._ttl_seconds = ttl_seconds
        self._index = redis_key(f"{self.name}s")
        self._active, self._finished = f"{self._index}:active", f"{self._index}:finished"
        self._keys = IdempotencyKeys(client, redis_key("idempotency", self.name), ttl_seconds)
        self._compare_and_run = client.register_script(COMPARE_AND_RUN)

    def create(
        self, record: R, idempotency_key: str | None = None, body: str = "", room: Room = Room()
    ) -> R:
        """Store a new record, or return the one that its owner made earlier with the same key.

        Raises IdempotencyConflict when the key came with another body, QueueFull.
        """
        if idempotency_key is None:
            self._commit(None, record, room)
            return record
        # an earlier request may still be on its way, or have died before it stored anything
        record_id = self._keys.take(record.owner, idempotency_key, body, record.id)
        record = record.replace(id=record_id)
        try:
            while not self._commit(None, record, room):
                with contextlib.suppress(RecordNotFound):  # it has expired meanwhile
                    return self.get(record_id)
        except QueueFull:  # what was refused may be asked for otherwise
            self._keys.give_back(record.owner, idempotency_key, unless=self._key(record_id))
            raise
        return record

    def require_room(self, owner: str, room: Room) -> None:
        """Raise QueueFull before a record is made: a cheap refusal while there is much to do.

        Only `create` keeps to the limits, whoever else creates a record meanwhile.
        """
        for index, most in self._limits(owner, room):
            if int(self._redis.zcard(index)) >= most:
                raise self._full(index, most)

    def replay(self, owner: str, idempotency_key: str | None, body: str) -> R | None:
        """Record that an earlier request of this owner with this key has made, if there is one.

        Raises IdempotencyConflict when the key came with another body.
        """
        key = idempotency_key
        record_id = None if key is None else self._keys.find(owner, key, body)
        if key is None or record_id is None:
            return None
        with contextlib.suppress(RecordNotFound):
            record = self.get(record_id)
            if record.problem != REFUSED:
                return record
            self._keys.forget(owner, key, record_id)  # clients try again with the same key
        return None

    def get(self, record_id: str) -> R:
        """Record of an id. Raises RecordNotFound, RecordUnreadable."""
        raw = self._raw(record_id) if ID.fullmatch(record_id) else None  # events' keys begin alike
        if raw is None:
            raise RecordNotFound(f"no {self.name} {record_id!r}")
        return self._read(record_id, raw)

    def _read(self, record_id: str, raw: str) -> R:
        record = readable(self._type, raw)
        if record is None:
            raise RecordUnreadable(
                f"{self.name} {record_id} was written by another release, or is corrupt: delete it"
            )
        return record

    def discard(self, record_id: str) -> None:
        """Delete what is left of a record that cannot be read. Raises RecordNotFound."""
        raw = self._raw(record_id) if ID.fullmatch(record_id) else None
        if raw is None:
            raise RecordNotFound(f"no {self.name} {record_id!r}")
        owner = ""
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            owner = str(json.loads(raw).get("owner", ""))
        with self._redis.pipeline() as pipe:
            for index in (*_each(self._index, owner), *_each(self._active, owner)):
                pipe.zrem(index, record_id)
            pipe.delete(self._key(record_id), stream_key(self.name, record_id))
            pipe.execute()

    def page(self, offset: int, limit: int, owner: str | None = None) -> Page[R]:
        """Records of one owner or of all, newest first."""
        index = self._index if owner is None else _each(self._index, owner)[1]
        ids = cast(list[str], self._redis.zrevrange(index, offset, offset + limit))
        records, gone = self._readable(ids[:limit], index)
        return Page(records, offset + limit - gone if len(ids) > limit else None)

    def _readable(self, ids: Sequence[str], index: str) -> tuple[list[R], int]:
        """Those of an index that are there; and how many have expired, which leave it."""
        raws = self._many([self._key(record_id) for record_id in ids])
        if gone := [record_id for record_id, raw in zip(ids, raws, strict=True) if raw is None]:
            self._redis.zrem(index, *gone)
        found = [record for raw in raws if raw and (record := readable(self._type, raw))]
        return found, len(gone)

    def all(self, owner: str | None = None) -> Iterator[R]:
        """All records of one owner or of all owners, newest first."""
        offset: int | None = 0
        while offset is not None:
            page = self.page(offset, PAGE_RECORDS, owner)
            yield from page.items
            offset = page.next_offset

    def seconds(self, record_id: str) -> float:
        """Seconds from a record's first event to its last, by the clock of Redis."""
        stream = stream_key(self.name, record_id)
        ends = (self._redis.xrange(stream, count=1), self._redis.xrevrange(stream, count=1))
        first, last = (int(cast(list[Any], end)[0][0].split("-")[0]) for end in ends)
        return (last - first) / 1000

    def count_active(self) -> int:
        """Number of unfinished records."""
        return int(self._redis.zcard(self._active))

    def active(self) -> list[R]:
        """Unfinished records, oldest first."""
        ids = cast(list[str], self._redis.zrange(self._active, 0, -1))
        return self._readable(ids, self._active)[0]

    def unleased(self, records: Sequence[R]) -> list[R]:
        """Those of `records` that nobody works on."""
        leases = self._many([self._lease(record.id) for record in records])
        return [record for record, lease in zip(records, leases, strict=True) if lease is None]

    def _many(self, keys: Sequence[str]) -> list[str | None]:
        """Values of keys, read in parts so that Redis does not keep others waiting."""
        parts = (keys[i : i + PAGE_RECORDS] for i in range(0, len(keys), PAGE_RECORDS))
        return [raw for part in parts for raw in cast(list[str | None], self._redis.mget(part))]

    def change(
        self, record_id: str, *, attempt: int | None = None, known: R | None = None, **changes: Any
    ) -> R:
        """Set fields, and write a `status` event; a new `status` must be reachable.

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
        """`change`, where the changes depend on what the record is by then."""
        while True:
            raw = known.model_dump_json() if known else self._raw(record_id)
            if raw is None:
                raise RecordNotFound(f"no {self.name} {record_id!r}")
            before = known or self._read(record_id, raw)
            try:
                record = self._changed(before, changes_of(before), attempt)
            except (Superseded, IllegalTransition):
                if known is None:
                    raise
            else:
                if self._commit(raw, record):
                    if record.finished and not before.finished:
                        metrics.FINISHED.labels(self.name, record.status).inc()
                    return record
            known = None  # what it is now decides

    def _changed(self, record: R, changes: dict[str, Any], attempt: int | None) -> R:
        if attempt is not None and (record.finished or record.attempts != attempt):
            raise Superseded(f"{record.id} is {record.status}, attempt {record.attempts}")
        status = changes.get("status", record.status)
        reachable = {record.status} | self._type.TRANSITIONS.get(record.status, set())
        if status not in reachable:
            raise IllegalTransition(f"{record.id} is {record.status}, it cannot be {status}")
        return record.replace(**changes)

    def tell(self, record_id: str, event: str, data: str) -> None:
        """Write an event (JSON)."""
        stream = stream_key(self.name, record_id)
        self._redis.xadd(stream, {"event": event, "data": data}, maxlen=MAX_EVENTS)

    def claim(
        self, record_id: str, max_attempts: int, lease_seconds: float, holder: str = ""
    ) -> Claim[R] | None:
        """Begin work on a record: the next attempt, under a lease of `holder`.

        None when there is nothing to do: the record is finished, or another worker has it. A
        record whose attempts are used up becomes `failed`.
        """
        lease = self._redis.lock(self._lease(record_id), lease_seconds, thread_local=False)
        token = f"{holder} {uuid.uuid4().hex}"
        while (raw := self._raw(record_id)) is not None:
            before = self._read(record_id, raw)
            if before.finished:
                return None
            taken: list[Command] = []
            if before.attempts >= max_attempts:
                error = f"gave up after {before.attempts} attempts; the worker died in each"
                record = before.replace(status="failed", error=error)
            else:
                record = before.replace(status=self._type.STARTED, attempts=before.attempts + 1)
                taken.append(("SET", lease.name, token, "PX", str(round(lease_seconds * 1000))))
            outcome = self._run(raw, record, taken, absent=lease.name)
            if outcome == HELD:
                return None
            if outcome == DONE and record.finished:
                metrics.FINISHED.labels(self.name, record.status).inc()
                return None
            if outcome == DONE:
                lease.local.token = token.encode()  # what Lock.acquire would have set
                if before.status == "queued":
                    waited_seconds = (now() - record.created_at).total_seconds()
                    metrics.QUEUE_WAIT.labels(self.name).observe(waited_seconds)
                return Claim(record, lease)
        return None

    def end_leases(self, records: Sequence[R], is_dead: Callable[[str], bool]) -> None:
        """End the leases of those of `records` whose holders are known to be dead."""
        leases = self._many([self._lease(record.id) for record in records])
        for record, token in zip(records, leases, strict=True):
            if token is not None and is_dead(token.partition(" ")[0]):
                lease = self._redis.lock(self._lease(record.id), thread_local=False)
                lease.local.token = token.encode()
                with contextlib.suppress(LockError):  # it has run out meanwhile
                    lease.release()

    def leased(self, record_id: str) -> bool:
        return bool(self._redis.exists(self._lease(record_id)))

    def _raw(self, record_id: str) -> str | None:
        return cast(str | None, self._redis.get(self._key(record_id)))

    def _commit(self, before: str | None, record: R, room: Room = Room()) -> bool:
        """Write a record and its event, unless it is no longer what it was before, or is new.

        Raises QueueFull when there is no room for another.
        """
        limits = self._limits(record.owner, room)
        indexes = _each(self._index, record.owner) if before is None else ()
        outcome = self._run(before, record, [_added(to, record) for to in indexes], limits=limits)
        if outcome <= FULL:
            raise self._full(*limits[FULL - outcome])
        return outcome == DONE

    def _limits(self, owner: str, room: Room) -> Limits:
        """Sets of unfinished records, and how many may be in each."""
        sets = zip(_each(self._active, owner), (room.all, room.of_owner), strict=True)
        return [(index, most) for index, most in sets if most is not None]

    def _full(self, index: str, most: int) -> QueueFull:
        """Refusal that says when the next record is finished, at the pace of the last ones."""
        ended = cast(list[str], self._redis.lrange(self._finished, 0, -1))
        pace = (time.time() - float(ended[-1])) / len(ended) if ended else 0
        seconds = min(max(math.ceil(pace), 1), MAX_RETRY_SECONDS)
        whose = f"{self.name}s {'here' if index == self._active else 'of yours'}"
        message = f"{most} {whose} are not finished, as many as may be; retry in {seconds} s"
        return QueueFull(message, seconds)

    def _run(
        self,
        before: str | None,
        record: R,
        more: list[Command],
        absent: str = "",
        limits: Limits = (),
    ) -> int:
        keys = [self._key(record.id), *([absent] if absent else [])]
        commands = json.dumps(self._commands(record) + more)
        arguments = [before or "", commands, json.dumps(limits)]
        return int(self._compare_and_run(keys=keys, args=arguments))

    def _commands(self, record: R) -> list[Command]:
        key, stream = self._key(record.id), stream_key(self.name, record.id)
        event = record.model_dump_json(include={"status", "revision", "attempts", "error"})
        commands: list[Command] = [
            ("SET", key, record.model_dump_json()),
            ("XADD", stream, "MAXLEN", "~", str(MAX_EVENTS), "*", "event", "status", "data", event),
        ]
        active = _each(self._active, record.owner)
        if not record.finished:
            return commands + [_added(index, record) for index in active]
        commands += [("ZREM", index, record.id) for index in active]
        commands.append(("DEL", self._lease(record.id)))  # else one more write to disk releases it
        if record.status not in GIVEN_UP:
            commands += _pushed(self._finished, str(time.time()), PACE_RECORDS)
        if record.status == "failed" and record.problem != REFUSED:
            failure = Failure(kind=self.name, id=record.id, error=record.error or "", at=now())
            commands += _pushed(FAILURES, failure.model_dump_json(), MAX_FAILURES)
        if isinstance(record, GenerationRecord) and record.status == "done" and not record.timed:
            commands.append(("HINCRBY", IMAGES, record.model, str(len(record.seeds))))
        kept_seconds = self._ttl_seconds
        if record.status == "deleted":
            kept_seconds = DELETED_SECONDS
            commands.append(("HDEL", IMAGES, record.id))
        if kept_seconds is not None:
            commands.append(("EXPIRE", key, str(kept_seconds)))
            commands.append(("EXPIRE", stream, str(min(kept_seconds, EVENTS_SECONDS))))
            commands += [("ZREM", to, record.id) for to in _each(self._index, record.owner)]
        elif record.status in GIVEN_UP:  # it stays in lists until then
            for name in (key, stream):
                commands.append(("EXPIRE", name, str(GIVEN_UP_SECONDS)))
        return commands

    def _key(self, record_id: str) -> str:
        return redis_key(self.name, record_id)

    def _lease(self, record_id: str) -> str:
        return f"{self._key(record_id)}:lease"


def _each(index: str, owner: str) -> tuple[str, str]:
    """The index of all, and that of the owner."""
    return index, f"{index}:of:{owner}"


def _added(index: str, record: Record) -> Command:
    return "ZADD", index, str(record.created_at.timestamp()), record.id


def _pushed(to: str, value: str, most: int) -> list[Command]:
    return [("LPUSH", to, value), ("LTRIM", to, "0", str(most - 1))]
