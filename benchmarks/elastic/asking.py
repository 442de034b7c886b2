"""Requests at given moments, whatever is answered, and what each of them was told."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

STRAGGLER_SECONDS = 60.0
Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    due: float
    """Moment at which it was due, in seconds from the first."""
    status: int
    """Status of HTTP; 0 where there was none."""
    seconds: float
    """Seconds from that moment to the answer."""
    elastic: Body | None

    def kept(self, seconds: float) -> bool:
        return self.status == 200 and self.seconds <= seconds


def ask(url: str, moments: Sequence[float], body: Callable[[int], Body]) -> list[Answer]:
    """An answer for each moment, in order."""
    return asyncio.run(_ask(url, moments, body))


async def _ask(url: str, moments: Sequence[float], body: Callable[[int], Body]) -> list[Answer]:
    timeout = aiohttp.ClientTimeout(total=STRAGGLER_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    began = time.perf_counter()

    async def one(http: aiohttp.ClientSession, number: int, due: float) -> Answer:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        status, told = 0, dict[str, Any]()
        try:
            async with http.post("/generate", json=body(number)) as answer:
                content = await answer.read()
                status = answer.status
                if answer.content_type == "application/json":
                    told = json.loads(content)
        except (aiohttp.ClientError, TimeoutError, ValueError):
            pass
        seconds = time.perf_counter() - began - due
        return Answer(due, status, seconds, told.get("elastic") if isinstance(told, dict) else None)

    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as http:
        return await asyncio.gather(*(one(http, i, due) for i, due in enumerate(moments)))
