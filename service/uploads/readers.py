"""Reading of uploads in processes of their own, which end with the client that waits for them."""

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
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
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()
        self._ends: dict[int, asyncio.Future[int]] = {}
        """Exit status, to come, of each upload's process."""
        self._turns = asyncio.Condition()
        self._reading: Counter[str] = Counter()
        self._waiting: defaultdict[str, int] = defaultdict(int)

    async def start(self) -> None:
        """Start the process whose copies read, unless it runs."""
        async with self._starting:
            if self._listening is None or self._listening.done():
                self._process = await _started()
                self._listening = asyncio.create_task(self._listen(self._process))

    async def close(self) -> None:
        if self._process is not None:
            await _end(self._process)
        if self._listening is not None:
            await self._listening

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                number, status = map(int, line.split())
                self._ends[number].set_result(status)
            await process.wait()
        finally:  # its copies end with it
            for ended in [*self._ends.values()]:
                if not ended.done():
                    ended.set_result(process.returncode or 0)

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
            status = await self._run(task)
        try:
            told = json.loads((into / "told.json").read_text())
        except (OSError, ValueError):
            log.warning("a reader ended", status=status, owner=owner)
            raise self._too_much() from None
        if "error" in told:
            raise DataError(told["error"])
        return Read(
            **told, images_file=into / "images.safetensors", preview_file=into / "preview.png"
        )

    async def _run(self, task: Mapping[str, Any]) -> int:
        """Exit status of the process that has read an upload; it ends when this is cancelled."""
        await self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        number, tell = next(self._numbers), self._process.stdin
        ended = self._ends[number] = asyncio.get_running_loop().create_future()
        ended.add_done_callback(lambda _: self._ends.pop(number))
        tell.write(f"{json.dumps({'number': number, 'task': task})}\n".encode())
        try:
            async with asyncio.timeout(TIMES_AS_LONG * self._processor_seconds):
                return await asyncio.shield(ended)
        except TimeoutError:
            raise self._too_much() from None
        finally:
            if not ended.done():
                tell.write(f"{json.dumps({'number': number})}\n".encode())
                await asyncio.shield(ended)

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
    """`reading`, which has said that it is ready."""
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
