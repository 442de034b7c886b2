"""Locks that a process renews for as long as it lives, and the leases of records among them.

A task runs under a lease. Whoever finds work that is under way without one enqueues it again, so
that no accepted request is lost with a process.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import redis
from redis.exceptions import LockError
from redis.lock import Lock

from learngenes.training.tuning import Pause
from registry.lifecycle import Records
from registry.records import GenerationRecord, ModelRecord
from registry.repository import Repository

WAITING_SECONDS = 0.5
"""Seconds after which whoever waits for a lock tells its holder so, again and again."""

R = TypeVar("R", bound=ModelRecord | GenerationRecord)


class Stopping(Pause):
    """The worker was told to stop; the record is taken up again after the next start."""


class Watch:
    """Watch over work: who does it tells that it moves, who ends stuck processes asks."""

    def __init__(self) -> None:
        self._moved_at: float | None = None
        """Time of the last move; None while nothing could be stuck."""

    def moved(self) -> None:
        self._moved_at = time.monotonic()

    def rest(self) -> None:
        """Stop watching: there is nothing to do, or another has to do it first."""
        self._moved_at = None

    @property
    def resting(self) -> bool:
        return self._moved_at is None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what runs inside, which tells now and then that it moves."""
        self.moved()
        try:
            yield
        finally:
            self.rest()

    def stuck_seconds(self) -> float:
        """Seconds since what is watched last moved; zero while nothing is."""
        moved_at = self._moved_at
        return 0.0 if moved_at is None else time.monotonic() - moved_at


class ProcessName(NamedTuple):
    """Name of a process by which others can tell whether it lives."""

    place: str
    """Boot of the machine, and PID namespace."""
    pid: int
    started_at: str

    @classmethod
    def own(cls) -> "ProcessName":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid = os.getpid()
        return cls(f"{boot}/{Path('/proc/self/ns/pid').readlink()}", pid, _started_at(pid))

    def __str__(self) -> str:
        return f"{self.place}/{self.pid}/{self.started_at}"


def is_dead(name: str) -> bool:
    """Whether the process of a ProcessName has ended; False where this one cannot know."""
    place, _, numbers = name.partition("]/")
    if f"{place}]" != ProcessName.own().place:
        return False
    pid, _, started_at = numbers.partition("/")
    return _started_at(int(pid)) != started_at


def _started_at(pid: int) -> str:
    """Start of a process, in ticks since boot; empty where there is none, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


class Leases:
    def __init__(
        self, repository: Repository, seconds: float, watch: Watch, stopping: threading.Event
    ) -> None:
        """A lock outlives a process that has died by `seconds`."""
        self._repository, self._seconds = repository, seconds
        self._watch, self._stopping = watch, stopping
        self._holder = str(ProcessName.own())
        self._kept: dict[Lock, None] = {}
        self._starting = threading.Lock()
        self._renewing = threading.Thread(target=self._renew, name="renew", daemon=True)

    def check_stopping(self) -> None:
        if self._stopping.is_set():
            raise Stopping

    @contextlib.contextmanager
    def claimed(
        self, records: Records[R], record_id: str, most_attempts: int
    ) -> Iterator[R | None]:
        """Claim a record and keep the claim alive; None when there is nothing to do."""
        claim = records.claim(record_id, most_attempts, self._seconds, self._holder)
        if claim is None:
            yield None
            return
        with self._kept_and_released(claim.lease):
            yield claim.record

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let one worker of all in at a time. Raises Stopping."""
        lock = self._repository.lock(name, self._seconds)
        resting = self._watch.resting
        self._watch.rest()  # who waits for another is not stuck
        while not lock.acquire(blocking_timeout=WAITING_SECONDS):
            self._repository.want(name, 2 * WAITING_SECONDS)
            self.check_stopping()
        with self._kept_and_released(lock):
            if not resting:
                self._watch.moved()
            yield

    @contextlib.contextmanager
    def first(self, name: str) -> Iterator[bool]:
        """Whether no other worker is at it; if so, none begins meanwhile."""
        lock = self._repository.lock(name, self._seconds)
        if not lock.acquire(blocking=False):
            yield False
            return
        with self._kept_and_released(lock):
            yield True

    @contextlib.contextmanager
    def _kept_and_released(self, lock: Lock) -> Iterator[None]:
        self._kept[lock] = None
        with self._starting:
            if not self._renewing.ident:
                self._renewing.start()
        try:
            yield
        finally:
            del self._kept[lock]
            with contextlib.suppress(LockError):  # it ended with the work, or ran out
                lock.release()

    def _renew(self) -> None:
        while True:
            time.sleep(self._seconds / 3)
            for lock in list(self._kept):
                # when it ran out, the record's attempt tells the work so; and when Redis is
                # away, the next renewal may succeed
                with contextlib.suppress(LockError, redis.RedisError):
                    lock.reacquire()
