"""Work that ends when the client that waits for it leaves."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

T = TypeVar("T")


async def left(connection: Request) -> None:
    """Wait until the client has left."""
    while (await connection.receive())["type"] != "http.disconnect":
        pass


async def while_connected(connection: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when the client leaves. Raises ClientDisconnect then."""

    working, leaving = asyncio.create_task(work), asyncio.create_task(left(connection))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        leaving.cancel()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working
