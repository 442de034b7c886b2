"""API keys: who may call the service, for what, how often and until when.

They live in a JSON file that only its owner may read. The file has the SHA-256 of each key; the
key itself, 256 random bits, is shown once, to whoever creates it. Processes read the file again
whenever it has changed, so a key that is created or revoked counts at once.
"""

import fcntl
import hashlib
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from learngenes.files import write_file
from registry.errors import KeysError

LOOK_SECONDS = 0.2
PREFIX = "fsk"
OWNER = re.compile(r"[\w.@-]{1,64}")
"""Pattern of an owner's name, which becomes a part of keys in Redis, between colons."""


def now() -> datetime:
    return datetime.now(UTC)


class Scope(StrEnum):
    GENERATE = "generate"
    """Sample from models of the key's owner."""
    DEPLOY = "deploy"
    """Make, cancel, export and delete models of the key's owner."""
    ADMIN = "admin"
    """Everything, for every owner; and what tells of everybody: /metrics, failures."""


class ApiKey(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Name of the key in lists and logs."""
    owner: str
    scopes: tuple[Scope, ...]
    sha256: str
    requests_per_minute: int | None = None
    max_active: int | None = None
    """Most unfinished models, and most unfinished generations."""
    created_at: datetime = Field(default_factory=now)
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    @property
    def state(self) -> str:
        """`valid`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now() else "valid"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ApiKey] = []


class Mark(Protocol):
    """Mark in another place that there have been API keys: a file that is missing is a mistake."""

    def __call__(self) -> bool | None:
        """Whether it is there; None while nobody can tell."""

    def keep(self) -> bool:
        """Leave it; whether it is there now."""


class Keys:
    """API keys in the file at `path`; every method raises KeysError where it cannot be read.

    Once there was a file, nobody comes in without a key, even if the file goes.
    """

    def __init__(self, path: Path, required: bool = False, made: Mark | None = None) -> None:
        """`required`: even without a file. `made` remembers in another place that there was one."""
        self.path = path
        self._lock = threading.Lock()
        self._required = required
        self._made = made
        if made is not None and not required:
            known = made()
            self._required = bool(known)
            if known is None:
                threading.Thread(target=self._look, args=(made,), daemon=True).start()
        self._seen: tuple[int, ...] | None = None
        self._by_sha256: dict[str, ApiKey] = {}

    @property
    def required(self) -> bool:
        there = self.path.exists()
        if there and self._made is not None:
            mark, self._made = self._made, None
            threading.Thread(target=_leave, args=(mark,), daemon=True).start()
        self._required = self._required or there
        return self._required

    def _look(self, made: Mark) -> None:
        """Look at the mark as soon as its place answers; before that nothing else does, either."""
        while (known := made()) is None:
            time.sleep(LOOK_SECONDS)
        self._required = self._required or known

    def find(self, key: str) -> ApiKey | None:
        """Key, valid or not, that was sent as `key`; None when there is no such key."""
        return self._known(_sha256(key))

    def of_sha256(self, sha256: str) -> ApiKey | None:
        return self._known(sha256)

    def valid(self, key: ApiKey) -> bool:
        """Whether the key is still valid."""
        known = self._known(key.sha256)
        return known is not None and known.state == "valid"

    def all(self) -> list[ApiKey]:
        """All keys, oldest first."""
        return self._read().keys if self.path.exists() else []

    def create(
        self,
        owner: str,
        scopes: Collection[Scope],
        *,
        requests_per_minute: int | None = None,
        max_active: int | None = None,
        valid_for: timedelta | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key, and the text that its holder sends. Raises KeysError."""
        if not OWNER.fullmatch(owner):
            raise KeysError(f"{owner!r} is no owner: use up to 64 letters, digits, and . _ @ -")
        key_id = f"k-{secrets.token_hex(4)}"
        key = f"{PREFIX}-{key_id[2:]}-{secrets.token_urlsafe(32)}"
        created = ApiKey(
            id=key_id,
            owner=owner,
            scopes=tuple(sorted(set(scopes))),
            sha256=_sha256(key),
            requests_per_minute=requests_per_minute,
            max_active=max_active,
            expires_at=None if valid_for is None else now() + valid_for,
        )
        with self._changing() as file:
            file.keys.append(created)
        return created, key

    def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key, which stays in the file for the record. Raises KeysError."""
        with self._changing() as file:
            for place, key in enumerate(file.keys):
                if key.id == key_id:
                    at = key.revoked_at or now()
                    file.keys[place] = key.model_copy(update={"revoked_at": at})
                    return file.keys[place]
        raise KeysError(f"no key {key_id!r}; `fineserve keys list` shows them")

    @contextmanager
    def _changing(self) -> Iterator[_File]:
        """The file, for one process at a time; readers see the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = _File(keys=self.all())
            yield file
            write_file(self.path, file.model_dump_json(indent=1).encode(), permissions=0o600)

    def _known(self, sha256: str) -> ApiKey | None:
        with self._lock:
            try:
                status = self.path.stat()
            except OSError as error:
                raise KeysError(f"the API keys cannot be read: {error}") from error
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen != self._seen:
                self._by_sha256 = {key.sha256: key for key in self._read().keys}
                self._seen = seen
            return self._by_sha256.get(sha256)

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self.path.read_bytes())
        except (OSError, ValidationError) as error:
            raise KeysError(f"the API keys in {self.path} cannot be read: {error}") from error


def _leave(mark: Mark) -> None:
    while not mark.keep():
        time.sleep(LOOK_SECONDS)


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
