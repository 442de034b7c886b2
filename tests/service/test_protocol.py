"""Limits on time and length, where no request is there yet."""

import asyncio
import time

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from service import protocol
from service.protocol import BoundedProtocol


async def app(_: object, __: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answered"})


async def heard(*parts: bytes, pause: float = 0) -> bytes:
    """All that a server answers to parts of a connection, sent with pauses between."""
    config = Config(app, lifespan="off", loop="asyncio")
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: BoundedProtocol(config, state, {}), "127.0.0.1", 0
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    server.close()
    return answer


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"GET / HTTP/1.1\r\n"],
        [b"GET / HTTP/1.1\r\n", b"A: b\r\n", b"C: d\r\n", b"E: f\r\n"],
    ],
)
def test_a_head_that_does_not_come_is_not_waited_for(
    parts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    answer = asyncio.run(heard(*parts, pause=0.1))
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert answer.endswith(b"were not there within 0 s.")


def test_a_head_that_is_too_long_is_refused_by_its_status() -> None:
    answer = asyncio.run(heard(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000))
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")


def test_a_head_of_too_many_fields_is_refused_by_its_status() -> None:
    answer = asyncio.run(heard(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 300 + b"\r\n"))
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert answer.endswith(b"have more than 200 fields; send fewer or shorter ones.")


def test_what_is_no_http_is_refused_after_a_pause_so_that_it_cannot_be_repeated_at_once() -> None:
    began = time.monotonic()
    answer = asyncio.run(heard(b"\x16\x03\x01 of TLS\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert time.monotonic() - began >= protocol.REFUSAL_SECONDS


def test_time_begins_anew_with_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    one = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = asyncio.run(
        heard(one, one, one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), pause=0.3)
    )
    assert answer.count(b"200 OK") == 3
    assert b"408" not in answer
