"""Harm that nobody does to a running service without a key."""

import contextlib
import json
import socket
import time
from http.client import HTTPConnection
from typing import Any

import pytest
import redis

from benchmarks.deployment import wait
from registry.records import WorkerRecord
from registry.repository import Repository
from tests.service.conftest import MOST_CONNECTIONS, Server

HOST = b"Host: 127.0.0.1\r\nConnection: close\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST
UPLOAD = b"POST /tasks HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\n".encode()
    return head + HOST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def problem(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def unknown_fields(size: int) -> bytes:
    return json.dumps({f"a{number}": 1 for number in range(size // 12)}).encode()


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST, b"longer than 65536 bytes"),
        (GET + b"X-Long: " + b"a" * 100_000 + b"\r\n", b"longer than 65536 bytes"),
        (GET + b"X-Short: a\r\n" * 10_000, b"more than 200 fields"),
        (UPLOAD + b"0\r\n" + b"X-Trailer: a\r\n" * 10_000, b"more than 200 fields"),
    ],
    ids=["request line", "one header", "many headers", "trailers"],
)
def test_a_head_without_end_is_refused(server: Server, head: bytes, why: bytes) -> None:
    answer = server.answer(head)
    assert answer.startswith(b"HTTP/1.1 431")
    assert why + b"; send fewer" in answer


def test_a_flood_of_headers_takes_no_memory(server: Server) -> None:
    server.answer(GET + b"\r\n")
    before = server.resident_bytes
    server.answer(GET + b"X-Short: a\r\n" * 2_000_000)
    assert server.resident_bytes - before < 10_000_000
    assert server.answer(GET + b"\r\n").startswith(b"HTTP/1.1 200")


def test_long_heads_of_people_with_many_cookies_are_read(server: Server) -> None:
    cookies = GET + b"Cookie: " + b"a" * 40_000 + b"\r\n\r\n"
    alive = cookies.replace(b"Connection: close\r\n", b"")
    assert server.answer(alive + alive + cookies).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    ("path", "size", "limit"), [("/session", 1_000_000, 4096), ("/plan", 100_000, 16_384)]
)
def test_a_body_too_large_is_not_parsed(server: Server, path: str, size: int, limit: int) -> None:
    answer = server.answer(post(path, unknown_fields(size)))
    assert len(answer) < 2000
    assert answer.startswith(b"HTTP/1.1 413")
    assert problem(answer)["limit"] == limit


def test_the_first_of_many_errors_are_told(server: Server) -> None:
    answer = server.answer(post("/plan", unknown_fields(1_000)))
    told = problem(answer)
    assert answer.startswith(b"HTTP/1.1 422")
    assert len(answer) < 10_000
    assert len(told["errors"]) == 20
    assert told["detail"].endswith("and 63 more")


def test_thousands_of_fields_are_one_error(server: Server) -> None:
    told = problem(server.answer(post("/plan", unknown_fields(16_000))))
    assert [error["field"] for error in told["errors"]] == [""]
    assert "1333 fields, where no request has 100" in told["detail"]


@pytest.mark.usefixtures("client")  # no family is left of another test
def test_more_uploads_than_a_few_come_back_later(server: Server) -> None:
    beginning = b"POST /tasks HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\na"
    assert b"no worker has announced a family" in server.answer(beginning + b"b")


def test_viewers_of_the_status_share_one_look(server: Server, client: redis.Redis) -> None:
    for queue in ("build", "sample"):
        worker = WorkerRecord(
            id=queue, queue=queue, device_class=f"a {queue} device", torch_version="2", families=[]
        )
        Repository(client, 60).heartbeat(worker, 60)

    def counted() -> tuple[int, int]:
        stats = client.info("stats")
        return stats["total_connections_received"], stats["total_commands_processed"]

    with contextlib.ExitStack() as viewers:
        for _ in range(20):
            viewer = viewers.enter_context(server.connect())
            viewer.sendall(b"GET /status/events HTTP/1.1\r\n" + HOST + b"\r\n")
            assert b"200 OK" in viewer.recv(65_536)
        before, seconds = counted(), 4
        time.sleep(seconds)
        connections, commands = (b - a for a, b in zip(before, counted(), strict=True))
    assert connections <= 2
    assert commands <= 40 * (seconds + 1)


def test_a_refusal_arrives_while_its_client_still_sends(server: Server) -> None:
    """A plain client reads nothing before it has sent everything."""
    for _ in range(10):
        connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/plan", b" " * 3_000_000, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_localhost_is_both_of_its_addresses(server: Server) -> None:
    with socket.create_connection(("::1", server.port), timeout=10) as connection:
        connection.sendall(GET.replace(b"127.0.0.1", b"[::1]") + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_more_connections_than_may_be_come_back_later(server: Server) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(MOST_CONNECTIONS):
            held.enter_context(server.connect())
        wait(lambda: server.answer(GET + b"\r\n").startswith(b"HTTP/1.1 503") or None, 10)
    assert wait(lambda: server.answer(GET + b"\r\n").startswith(b"HTTP/1.1 200") or None, 10)


def test_a_stream_does_not_keep_the_service_from_ending(server: Server) -> None:
    """The last test here, of course."""
    with server.connect() as viewer:
        viewer.sendall(b"GET /status/events HTTP/1.1\r\n" + HOST + b"\r\n")
        assert b"200 OK" in viewer.recv(65_536)
        server.process.terminate()
        began = time.monotonic()
        server.process.wait(20)
        assert time.monotonic() - began < 5
