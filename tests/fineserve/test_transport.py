"""How requests travel: through the proxy of the environment, and again when they are refused."""

import asyncio
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from httpx_retries import Retry

from fineserve import AsyncClient, Client
from fineserve.wire import TaskResponse
from tests.support.commands import run
from tests.support.servers import Answer, serving

TASK = TaskResponse(
    id="t-1",
    name="pets",
    family="tiny",
    class_names=["cat", "dog"],
    counts=[3, 3],
    created_at="2026-01-01T00:00:00Z",
)
ONCE = Retry(total=1, allowed_methods=["POST"])
IMAGES = bytes(range(256)) * 1000


@dataclass
class Busy:
    """A service that has no time, each second time."""

    paths: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    def __call__(self, method: str, path: str, body: bytes) -> Answer:
        if method == "GET":
            return Answer(502)
        self.paths.append(path)
        self.bodies.append(body)
        return Answer(503 if len(self.paths) % 2 else 201, TASK.model_dump_json().encode())


@pytest.fixture
def busy() -> Iterator[Busy]:
    busy = Busy()
    with serving(busy) as busy.url:
        yield busy


async def uploaded(url: str, file: io.BytesIO) -> TaskResponse:
    async with AsyncClient(url, retry=ONCE) as client:
        return await client.create_task(file, name="pets")


def test_an_upload_is_sent_again_from_where_it_began(busy: Busy) -> None:
    file = io.BytesIO(b"read already" + IMAGES)
    file.seek(len(b"read already"))
    with Client(busy.url, retry=ONCE) as client:
        assert client.create_task(file, name="pets") == TASK
    file.seek(len(b"read already"))
    assert asyncio.run(uploaded(busy.url, file)) == TASK
    assert busy.bodies == [IMAGES] * 4


def test_the_environments_proxy_is_used_but_for_what_it_excludes(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", busy.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Client("http://fineserve.example", retry=ONCE) as client:
        client.create_task(io.BytesIO(IMAGES))
    with Client(busy.url, retry=ONCE) as client:
        client.create_task(io.BytesIO(IMAGES))
    assert busy.paths == ["http://fineserve.example/tasks"] * 2 + ["/tasks"] * 2


def test_a_proxy_with_nobody_behind_it_is_nobody(busy: Busy) -> None:
    assert "502" in run("models", "list", "--url", busy.url, exit_code=3).stderr
