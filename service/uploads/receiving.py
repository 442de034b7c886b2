"""Uploads on their way: a place for each, a least pace, and room on the disk for what they say."""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import IO

from fastapi import Request

from service.problems import Problem, storage_full

MOST_OF_OWNER = 4
MOST_OF_ALL = 32
"""Uploads that are received at once: each holds a file, and its connection."""
PATIENCE_SECONDS = 15.0
LEAST_BYTES_PER_SECOND = 20_000
"""Pace below which an upload is ended, once PATIENCE_SECONDS have passed."""
BUSY_SECONDS = 10


class Receiving:
    def __init__(self) -> None:
        self._owners: Counter[str] = Counter()
        self._awaited_bytes = 0

    @contextlib.contextmanager
    def place(self, owner: str, announced_bytes: int, room_bytes: float) -> Iterator[None]:
        """A place for an upload of so many bytes. Raises Problem 429, and 507 without room."""
        mine, most = self._owners[owner], self._owners.total() >= MOST_OF_ALL
        if most or mine >= MOST_OF_OWNER:
            whose = f"{MOST_OF_ALL} uploads" if most else f"{MOST_OF_OWNER} uploads of yours"
            raise Problem(
                429,
                "too-many-uploads",
                f"{whose} are under way; send this one again when one has ended",
                headers={"Retry-After": str(BUSY_SECONDS)},
            )
        if announced_bytes > room_bytes - self._awaited_bytes:
            raise storage_full(f"there is no room for an upload of {announced_bytes / 1e6:.0f} MB")
        self._owners[owner] += 1
        self._awaited_bytes += announced_bytes
        try:
            yield
        finally:
            self._awaited_bytes -= announced_bytes
            self._owners[owner] -= 1


async def received(connection: Request, file: IO[bytes], most_bytes: int) -> str:
    """SHA-256 of the body, which is then in `file`. Raises Problem 408 and 413."""
    digest, size = hashlib.sha256(), 0
    async for chunk in _paced(connection.stream()):
        digest.update(chunk)
        size += len(chunk)
        if size > most_bytes:
            raise too_large(most_bytes)
        file.write(chunk)
    file.flush()
    return digest.hexdigest()


def too_large(most_bytes: int) -> Problem:
    return Problem(
        413,
        "upload-too-large",
        f"the upload has more than {most_bytes / 1e6:g} MB; send fewer or smaller images: they are "
        "scaled to the family's size anyway",
        limit=most_bytes,
    )


async def _paced(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    ends, size = loop.time() + PATIENCE_SECONDS, 0
    while True:
        try:
            async with asyncio.timeout_at(ends + size / LEAST_BYTES_PER_SECOND):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Problem(
                408,
                "too-slow",
                f"the upload came more slowly than {LEAST_BYTES_PER_SECOND / 1000:.0f} kB a "
                "second; send it again over a better line, or fewer images",
                headers={"Connection": "close"},
            ) from None
        size += len(chunk)
        yield chunk
