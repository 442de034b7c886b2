"""Clients and the command line where a proxy keeps the service's events to itself."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from httpx_retries import Retry

from fineserve import AsyncClient, Client
from fineserve import client as clients
from fineserve.client import FineserveError
from fineserve.wire import GenerateRequest, ModelRequest, ModelResponse, PlanRequest
from tests.support.commands import run
from tests.support.records import queued_model
from tests.support.servers import Answer, serving

BRIEF = Retry(total=3, backoff_factor=0.05, backoff_jitter=0)
"""Three tries more, after pauses of 0.1, 0.2 and 0.4 s."""
MODEL = ModelResponse.model_validate(queued_model().replace(id="m-1"))


@dataclass
class Proxied:
    """A model that is built; of its events a proxy makes `events`."""

    events: Answer
    asked: Counter[str] = field(default_factory=Counter)
    url: str = ""

    def __call__(self, method: str, path: str, body: bytes) -> Answer:
        self.asked[path] += 1
        model = Answer(content=MODEL.model_dump_json().encode())
        return self.events if path == "/models/m-1/events" else model


@pytest.fixture(
    params=[Answer(200, b"<html>welcome</html>", "text/html"), Answer(kind="text/event-stream")],
    ids=["html", "end"],
)
def proxied(request: pytest.FixtureRequest) -> Iterator[Proxied]:
    proxied = Proxied(request.param)
    with serving(proxied) as proxied.url:
        yield proxied


@pytest.fixture
def cut_off() -> Iterator[Proxied]:
    """A proxy that passes on the first event, a sign of life, and no more."""
    events = b'id: 1\nevent: status\ndata: {"status": "building"}\n\n: ping\n\n'
    proxied = Proxied(Answer(200, events, "text/event-stream"))
    with serving(proxied) as proxied.url:
        yield proxied


async def awaited(url: str) -> None:
    async with AsyncClient(url, retry=BRIEF) as client:
        await client.wait("m-1")


def blocked(url: str) -> None:
    with Client(url, retry=BRIEF) as client:
        client.wait("m-1")


@pytest.mark.parametrize("wait", [blocked, lambda url: asyncio.run(awaited(url))])
def test_events_that_never_come_are_given_up(proxied: Proxied, wait: Callable[[str], None]) -> None:
    started = time.monotonic()
    with pytest.raises(FineserveError, match=r"tells no events .* m-1 is queued") as given_up:
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


def test_a_command_says_what_it_awaits(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fineserve.cli.connection.retries", lambda kind: kind(total=1))
    result = run("models", "watch", "m-1", "--url", proxied.url, exit_code=1)
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
    sampling = set(GenerateRequest.model_fields) - {"model", "size", "format"}
    assert set(clients.GenerationFields.__annotations__) == sampling
    public = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert public == {name for name in vars(Client) if not name.startswith("_")}
