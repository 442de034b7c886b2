"""Sessions of browsers: random ids in place of API keys, which end by themselves and with them."""

import contextlib
import hashlib
import secrets
from typing import cast

import redis

from registry.events import redis_key
from registry.keys import ApiKey

MADE = redis_key("keys-made")


class Sessions:
    """Redis holds the SHA-256 of each id, and that of the key it stands for."""

    def __init__(self, client: redis.Redis, seconds: int) -> None:
        self._redis, self._seconds = client, seconds

    def begin(self, key: ApiKey) -> str:
        """Id of a new session of a key."""
        session = secrets.token_urlsafe(32)
        self._redis.set(_name(session), key.sha256, ex=self._seconds)
        return session

    def key_sha256(self, session: str) -> str | None:
        """SHA-256 of the key of a session; None where there is none, or it has ended."""
        return cast(str | None, self._redis.get(_name(session)))

    def end(self, session: str) -> None:
        self._redis.delete(_name(session))


class KeysMade:
    """Mark that there have been API keys (`registry.keys.Mark`)."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def __call__(self) -> bool | None:
        with contextlib.suppress(redis.RedisError):
            return bool(self._redis.exists(MADE))
        return None

    def keep(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self._redis.set(MADE, "1"))
        return False


def _name(session: str) -> str:
    return redis_key("session", hashlib.sha256(session.encode()).hexdigest())
