"""API keys: who may call the service, for what, how often and until when.

They live in a JSON file that only its owner may read. Of a key it has the SHA-256 alone; the key
itself, 256 random bits, is shown once, to whoever creates it. Processes read the file again
whenever it has changed, so a key that is created or revoked counts at once.
"""

import fcntl
import hashlib
import re
import secrets
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from learngenes.files import write_file
from registry.errors import KeysError

PREFIX = "fsk"


def now() -> datetime:
    return datetime.now(UTC)


class Scope(StrEnum):
    GENERATE = "generate"
    """Sample from models of the key's owner."""
    DEPLOY = "deploy"
    """Make, cancel, export and delete models of the key's owner."""
    ADMIN = "admin"
    """Everything, of every owner; and what tells of everybody: /metrics, failures."""


class ApiKey(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """What lists and logs call it by."""
    owner: str
    scopes: tuple[Scope, ...]
    sha256: str
    requests_per_minute: int | None = None
    max_active: int | None = None
    """Of unfinished models, and of unfinished generations."""
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


OWNER = re.compile(r"[\w.@-]{1,64}")
"""It becomes a part of keys in Redis, between colons."""


class Keys:
    """The file at `path`; once there was one, nobody comes in without a key, even if it goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._required = False
        self._seen: tuple[int, ...] | None = None
        self._by_sha256: dict[str, ApiKey] = {}

    @property
    def required(self) -> bool:
        self._required = self._required or self.path.exists()
        return self._required

    def find(self, key: str) -> ApiKey | None:
        """Valid or not; None when there is no such key. Raises KeysError."""
        with self._lock:
            self._refresh()
            return self._by_sha256.get(_sha256(key))

    def valid(self, key: ApiKey) -> bool:
        """Still. Raises KeysError."""
        with self._lock:
            self._refresh()
            now_known = self._by_sha256.get(key.sha256)
        return now_known is not None and now_known.state == "valid"

    def all(self) -> list[ApiKey]:
        """Oldest first. Raises KeysError."""
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
        """A new one, and what its holder sends. Raises KeysError."""
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
        """It stays in the file, for the record. Raises KeysError."""
        with self._changing() as file:
            for place, key in enumerate(file.keys):
                if key.id == key_id:
                    at = key.revoked_at or now()
                    file.keys[place] = key.model_copy(update={"revoked_at": at})
                    return file.keys[place]
        raise KeysError(f"no key {key_id!r}; `fineserve keys list` shows them")

    @contextmanager
    def _changing(self) -> Iterator[_File]:
        """One process at a time; readers see the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self._read() if self.path.exists() else _File()
            yield file
            write_file(self.path, file.model_dump_json(indent=1).encode(), permissions=0o600)

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
        except OSError as error:
            raise KeysError(f"the API keys cannot be read: {error}") from error
        seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        if seen != self._seen:
            self._by_sha256 = {key.sha256: key for key in self._read().keys}
            self._seen = seen

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self.path.read_bytes())
        except (OSError, ValidationError) as error:
            raise KeysError(f"the API keys in {self.path} cannot be read: {error}") from error


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
