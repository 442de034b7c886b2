"""The clients, and the command line, where a proxy keeps the service's events to itself."""

import asyncio
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from httpx_retries import Retry
from typer.testing import CliRunner

from fineserve import AsyncClient, Client
from fineserve import client as clients
from fineserve.cli.main import cli
from fineserve.client import FineserveError
from fineserve.wire import GenerateRequest, ModelRequest, ModelResponse, PlanRequest
from learngenes.config import DType, Mode
from learngenes.sizing.budget import Budget, Cost, Plan

BRIEF = Retry(total=3, backoff_factor=0.05, backoff_jitter=0)
"""Pauses of 0.1, 0.2 and 0.4 s."""
MODEL = ModelResponse(
    id="m-1",
    name="mine",
    family="tiny",
    device_class="cpu",
    task="default",
    class_names=None,
    status="building",
    revision=None,
    budget=Budget(max_mem_gb=1),
    refine=None,
    plan=Plan(2, 8, Mode.FACTORED, DType.FLOAT32, 4, Cost(1, 1, 1, 1), 1),
    measured=None,
    over_budget=[],
    error=None,
    created_at="2026-01-01T00:00:00Z",
    ready_at=None,
)


class Proxied(http.server.ThreadingHTTPServer):
    """A model that is built; of its events the proxy makes `content`."""

    def __init__(self, kind: str, content: bytes) -> None:
        self.kind, self.content, self.asked = kind, content, Counter[str]()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Proxied

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        if self.path == "/models/m-1/events":
            kind, content = self.server.kind, self.server.content
        else:
            kind, content = "application/json", MODEL.model_dump_json().encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(
    params=[("text/html", b"<html>welcome</html>"), ("text/event-stream", b"")], ids=["html", "end"]
)
def proxied(request: pytest.FixtureRequest) -> Iterator[Proxied]:
    yield from served(*request.param)


def served(kind: str, content: bytes) -> Iterator[Proxied]:
    with Proxied(kind, content) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cut_off() -> Iterator[Proxied]:
    """It passes on the first event, a sign of life, and no more."""
    content = b'id: 1\nevent: status\ndata: {"status": "building"}\n\n: ping\n\n'
    yield from served("text/event-stream", content)


async def awaited(url: str) -> None:
    async with AsyncClient(url, retry=BRIEF) as client:
        await client.wait("m-1")


def blocked(url: str) -> None:
    with Client(url, retry=BRIEF) as client:
        client.wait("m-1")


@pytest.mark.parametrize("wait", [blocked, lambda url: asyncio.run(awaited(url))])
def test_events_that_never_come_are_asked_for_a_few_times(
    proxied: Proxied, wait: Callable[[str], None]
) -> None:
    started = time.monotonic()
    with pytest.raises(FineserveError, match=r"tells no events .* m-1 is building") as given_up:
        wait(proxied.url)
    assert given_up.value.kind == "no-events"
    assert time.monotonic() - started > 0.7
    assert proxied.asked["/models/m-1/events"] == 4


def test_events_that_are_told_already_are_no_progress(cut_off: Proxied) -> None:
    heard: list[tuple[str, str]] = []
    with Client(cut_off.url, retry=BRIEF) as client, pytest.raises(FineserveError, match="no ev"):
        client.wait("m-1", lambda name, content: heard.append((name, content["status"])))
    assert heard == [("status", "building")] * 5
    assert cut_off.asked["/models/m-1/events"] == 5


def test_the_command_line_says_what_it_waits_for(
    proxied: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fineserve.cli.connection.retries", lambda kind: kind(total=1))
    result = CliRunner().invoke(cli, ["models", "watch", "m-1", "--url", proxied.url])
    assert result.exit_code == 1
    assert result.stderr.count("asking again") == 1
    assert "tells no events" in result.stderr


def test_another_answer_than_fineserves_is_said(proxied: Proxied, tmp_path: Path) -> None:
    with Client(proxied.url) as client:
        for ask in (client.tasks, client.status, lambda: client.generation("g-1")):
            with pytest.raises(FineserveError, match="answered something else: is that fineserve"):
                ask()
        with pytest.raises(FineserveError, match="no tar"):
            client.export("m-1", tmp_path)


def test_a_client_has_the_words_of_the_wire() -> None:
    assert set(clients.PlanFields.__annotations__) == set(PlanRequest.model_fields)
    assert set(clients.ModelFields.__annotations__) == set(ModelRequest.model_fields)
    sampling = set(GenerateRequest.model_fields) - {"model", "format"}
    assert set(clients.GenerateFields.__annotations__) == sampling
    public = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert public == {name for name in vars(Client) if not name.startswith("_")}
