"""Processes that read uploads, each one upload, ended with the client that waits for it."""

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from learngenes.data.images import DataError
from registry.settings import PACKAGES
from service.uploads.archives import UploadLimits

log = structlog.get_logger()

AT_ONCE = min(2, max(1, (os.cpu_count() or 1) // 2))
"""Uploads that are read at a time, of different owners where several wait; half of the processors
are left to images."""
NICENESS = "10"
"""Of these processes, from their start: what strangers send waits for images, which are served."""
WARM = 1
"""Processes that have started and wait for an upload."""
TIMES_AS_LONG = 4
"""Wall-clock seconds for each second of processor time that reading may take."""


@dataclass(frozen=True)
class Read:
    """What a process made of an upload; its images and preview are files."""

    class_names: list[str]
    counts: list[int]
    skipped: list[dict[str, Any]]
    images_file: Path
    preview_file: Path


class Readers:
    def __init__(self, processor_seconds: int) -> None:
        """`processor_seconds`: most that one upload may take."""
        self._processor_seconds = processor_seconds
        self._warm: list[asyncio.subprocess.Process] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Condition()
        self._reading: Counter[str] = Counter()
        self._waiting: defaultdict[str, int] = defaultdict(int)

    async def start(self) -> None:
        while len(self._warm) < WARM:
            self._warm.append(await _started())

    def _start_next(self) -> None:
        """Start another process, for which nobody waits."""
        task = asyncio.create_task(self.start())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def close(self) -> None:
        for task in [*self._starting]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await task
        for process in self._warm:
            await _end(process)
        self._warm.clear()

    async def read(
        self,
        file: Path,
        into: Path,
        owner: str,
        limits: UploadLimits,
        channels: int,
        side: int,
    ) -> Read:
        """Read the archive `file`, leaving what it holds in the folder `into`.

        Raises DataError. When it is cancelled, the process ends.
        """
        task = {
            "file": str(file),
            "into": str(into),
            "limits": asdict(limits),
            "channels": channels,
            "side": side,
            "processor_seconds": self._processor_seconds,
        }
        async with self._turn(owner):
            process = self._warm.pop() if self._warm else await _started()
            self._start_next()
            try:
                await self._run(process, json.dumps(task))
            finally:
                await _end(process)
        try:
            told = json.loads((into / "told.json").read_text())
        except (OSError, ValueError):
            log.warning("a reader ended", status=process.returncode, owner=owner)
            raise self._too_much() from None
        if "error" in told:
            raise DataError(told["error"])
        return Read(
            **told, images_file=into / "images.safetensors", preview_file=into / "preview.png"
        )

    async def _run(self, process: asyncio.subprocess.Process, task: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{task}\n".encode())
        with contextlib.suppress(ConnectionError):  # it has ended, and told.json is not there
            await process.stdin.drain()
        try:
            async with asyncio.timeout(TIMES_AS_LONG * self._processor_seconds):
                await process.wait()
        except TimeoutError:
            raise self._too_much() from None

    def _too_much(self) -> DataError:
        return DataError(
            "to read it takes too much memory, or more than "
            f"{self._processor_seconds} s of a processor; send fewer or smaller images"
        )

    @contextlib.asynccontextmanager
    async def _turn(self, owner: str) -> AsyncIterator[None]:
        """One of AT_ONCE places; an owner has a second one only while no other waits."""

        def free() -> bool:
            others_wait = any(n for name, n in self._waiting.items() if name != owner)
            mine = self._reading[owner]
            return self._reading.total() < AT_ONCE and not (mine and others_wait)

        async with self._turns:
            self._waiting[owner] += 1
            try:
                await self._turns.wait_for(free)
            finally:
                self._waiting[owner] -= 1
                if not self._waiting[owner]:
                    del self._waiting[owner]
            self._reading[owner] += 1
        try:
            yield
        finally:
            async with self._turns:
                self._reading[owner] -= 1
                self._turns.notify_all()


async def _started() -> asyncio.subprocess.Process:
    """A process that is ready to read: it has said so."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FINESERVE_")},  # no secrets
        "OPENBLAS_NUM_THREADS": "1",  # each would reserve memory that counts
        "PYTHONPATH": str(PACKAGES),
    }
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", NICENESS, sys.executable, "-m", "service.uploads.reading"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    try:
        await process.stdout.readline()
    except BaseException:  # nobody else knows of it
        await asyncio.shield(_end(process))
        raise
    return process


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
