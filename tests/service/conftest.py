import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from benchmarks.deployment import free_port
from registry.settings import Settings
from service.app import make_app
from service.deps import State
from tests.support.builds import build
from tests.support.devices import beat
from worker.runtime import Runtime
from worker.sampling.sample import Sampling

LOCAL = "http://127.0.0.1"
Headers = dict[str, str] | None
MOST_CONNECTIONS = 60
"""Of the server that is a process of its own."""
ASYNC = {"prefer": "respond-async"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@dataclass
class Stack:
    """The API over real HTTP semantics, and a worker that works when told to."""

    api: TestClient
    runtime: Runtime
    fixtures: pytest.FixtureRequest

    @property
    def sampler(self) -> Sampling:
        """Sampling worker, started when first asked for: its engine takes seconds to start."""
        return self.fixtures.getfixturevalue("sampler")

    @property
    def state(self) -> State:
        return self.api.app.state.fineserve

    def plan(self, **body: object) -> httpx.Response:
        return self.api.post("/plan", json=body)

    def deploy(self, headers: Headers = None, **body: object) -> httpx.Response:
        """Answer to the request for a model, in 4 GB unless `body` says otherwise."""
        return self.api.post("/models", json={"max_mem_gb": 4, **body}, headers=headers)

    def generate(self, model: str, headers: Headers = None, **body: object) -> httpx.Response:
        """Answer to the request for images, in two steps unless `body` says otherwise."""
        content = {"model": model, "num_inference_steps": 2, **body}
        return self.api.post("/generate", json=content, headers=headers)

    def told(self, path: str) -> dict[str, Any]:
        return self.api.get(path).json()

    def make_model(self, **body: object) -> str:
        """Id of a queued model."""
        answer = self.deploy(**body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ready_model(self, **body: object) -> str:
        """Id of a model that is built."""
        model_id = self.make_model(**body)
        build(self.runtime, model_id)
        return model_id

    def queue(self, model: str, headers: Headers = None, **body: object) -> str:
        """Id of a generation that waits for a worker."""
        answer = self.generate(model, ASYNC | (headers or {}), **body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def heartbeat(self, seconds: float = 60, **changes: object) -> None:
        """Tell of the build worker, or of one with `changes`."""
        beat(self.runtime, seconds, **changes)


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    """The API alone: no worker has said anything."""
    with TestClient(make_app(settings), LOCAL) as api:
        yield api


@pytest.fixture
def stack(api: TestClient, runtime: Runtime, request: pytest.FixtureRequest) -> Stack:
    return Stack(api, runtime, request)


@dataclass
class Server:
    """The API as a process of its own, spoken to byte by byte."""

    process: "subprocess.Popen[bytes]"
    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def answer(self, request: bytes) -> bytes:
        """Bytes until the server closes the connection, however much of the request it reads."""
        heard = b""
        with self.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(request)
            with contextlib.suppress(ConnectionResetError):
                while chunk := connection.recv(65_536):
                    heard += chunk
        return heard

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def server(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    given = {
        "redis_url": valkey_url,
        "var_dir": tmp_path_factory.mktemp("var"),
        "port": port,
        "max_connections": MOST_CONNECTIONS,
    }
    environment = {f"FINESERVE_{name.upper()}": str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL
    ) as process:
        try:
            server = Server(process, port)
            for _ in range(600):
                with contextlib.suppress(ConnectionRefusedError), server.connect():
                    break
                assert process.poll() is None, "the service did not start"
                time.sleep(0.05)
            yield server
        finally:
            process.kill()
