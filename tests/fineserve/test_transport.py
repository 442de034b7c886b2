"""How requests travel: through the proxy of the environment, and again when they are refused."""

import asyncio
import http.server
import io
import threading
from collections.abc import Iterator

import pytest
from httpx_retries import Retry
from typer.testing import CliRunner

from fineserve import AsyncClient, Client
from fineserve.cli.main import cli
from fineserve.wire import TaskResponse

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


class Busy(http.server.ThreadingHTTPServer):
    """It has no time, each second time."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Busy

    def do_GET(self) -> None:
        self.send_error(502)

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(503 if len(self.server.paths) % 2 else 201)
        self.end_headers()
        self.wfile.write(TASK.model_dump_json().encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[Busy]:
    with Busy() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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
    result = CliRunner().invoke(cli, ["models", "list", "--url", busy.url])
    assert result.exit_code == 3
    assert "502" in result.stderr
