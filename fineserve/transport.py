"""Transport of the client's requests: retries, proxies, and calls without an event loop."""

import asyncio
import io
import ipaddress
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
from httpx_retries import Retry

T = TypeVar("T")

TIMEOUT = httpx.Timeout(30, read=330)
CHUNK_BYTES = 1 << 16


def retries(kind: type[Retry] = Retry) -> Retry:
    """Retries of the client, by default."""
    return kind(
        total=8,
        backoff_factor=0.5,
        max_backoff_wait=120.0,
        allowed_methods=("GET", "POST", "DELETE"),
        status_forcelist=(429, 502, 503),
    )


RETRIES = retries()


def result_of(coroutine: Coroutine[Any, Any, T]) -> T:
    """Result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError(f"{coroutine} waits")


class BlockingTransport(httpx.AsyncBaseTransport):
    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._transport.handle_request(request)
        assert isinstance(answer.stream, httpx.SyncByteStream)
        answer.stream = _Blocking(answer.stream)
        return answer

    async def aclose(self) -> None:
        self._transport.close()


class _Blocking(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._stream:
            yield chunk

    async def aclose(self) -> None:
        self._stream.close()


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Body from a file, read from the same place at each try."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()
        self.size = file.seek(0, io.SEEK_END) - self._start

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(self._start)
        while chunk := self._file.read(CHUNK_BYTES):
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._file.seek(self._start)
        while chunk := await asyncio.to_thread(self._file.read, CHUNK_BYTES):
            yield chunk


def proxy_of(url: str) -> str | None:
    """Proxy that this host's environment names for the service, unless it is on this host."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host == "localhost" or _is_loopback(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
