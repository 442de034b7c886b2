"""A request that is sent again with the Idempotency-Key of an earlier one makes nothing new."""

import hashlib
from typing import cast

import redis

from registry.errors import IdempotencyConflict

MOST_SECONDS = 24 * 3600
FORGET = """
local taken = redis.call('GET', KEYS[1])
if taken and string.sub(taken, -#ARGV[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
"""Lua script that deletes a key, unless it is another record's by now."""
FREE = "if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('DEL', KEYS[1]) end"


class IdempotencyKeys:
    """Ids of the records of one type that each owner's requests have made, by key.

    Raises IdempotencyConflict when the earlier request with a key had another body.
    """

    def __init__(self, client: redis.Redis, prefix: str, record_seconds: int | None) -> None:
        self._redis, self._prefix = client, prefix
        self._seconds = min(MOST_SECONDS, record_seconds or MOST_SECONDS)

    def take(self, owner: str, key: str, body: str, record_id: str) -> str:
        """Id that an earlier request with this key took, or else this one."""
        taken, name = f"{_digest(body)} {record_id}", self._name(owner, key)
        earlier = self._redis.set(name, taken, nx=True, get=True, ex=self._seconds)
        return record_id if earlier is None else _record_id(cast(str, earlier), key, body)

    def give_back(self, owner: str, key: str, *, unless: str) -> None:
        """Free a key whose request has made nothing, unless another has: its record is there."""
        self._redis.eval(FREE, 2, self._name(owner, key), unless)

    def forget(self, owner: str, key: str, record_id: str) -> None:
        """Free a key whose record was refused, so that the same may be asked for again."""
        self._redis.eval(FORGET, 1, self._name(owner, key), record_id)

    def find(self, owner: str, key: str, body: str) -> str | None:
        earlier = cast(str | None, self._redis.get(self._name(owner, key)))
        return None if earlier is None else _record_id(earlier, key, body)

    def _name(self, owner: str, key: str) -> str:
        return f"{self._prefix}:{owner}:{key}"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _record_id(taken: str, key: str, body: str) -> str:
    digest, _, record_id = taken.partition(" ")
    if digest != _digest(body):
        raise IdempotencyConflict(f"Idempotency-Key {key!r} was used for another request")
    return record_id
