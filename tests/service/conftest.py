import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from learngenes.sizing.profile import DeviceProfile
from registry.records import WorkerRecord
from registry.settings import Settings
from service.app import make_app
from tests.support.builds import build
from tests.support.devices import keep_profile
from worker.runtime import Runtime
from worker.sampling.sample import Sampling

LOCAL = "http://127.0.0.1"


@dataclass
class Stack:
    """The API over real HTTP semantics, and a worker that works when told to."""

    api: TestClient
    runtime: Runtime
    sampler: Sampling

    def plan(self, **body: object) -> httpx.Response:
        return self.api.post("/plan", json=body)

    def make_model(self, max_mem_gb: float = 4) -> str:
        answer = self.api.post("/models", json={"max_mem_gb": max_mem_gb})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ready_model(self, max_mem_gb: float = 4) -> str:
        model_id = self.make_model(max_mem_gb)
        build(self.runtime, model_id)
        return model_id

    def heartbeat(self, seconds: float = 60, **changes: object) -> None:
        """Of the build worker, unless it says otherwise."""
        beat(self.runtime, seconds, **changes)


def beat(runtime: Runtime, seconds: float = 60, **changes: object) -> None:
    worker = {
        "id": "a-worker",
        "queue": "build",
        "device_class": runtime.device_class,
        "torch_version": torch.__version__,
        "families": ["tiny"],
    }
    record = WorkerRecord.model_validate({**worker, **changes})
    runtime.repository.heartbeat(record, seconds)


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    """The API alone: no worker has said anything."""
    with TestClient(make_app(settings), LOCAL) as api:
        yield api


@dataclass
class Server:
    """The API as a process of its own, spoken to byte by byte."""

    process: "subprocess.Popen[bytes]"
    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def answer(self, request: bytes) -> bytes:
        """What it says until it closes the connection, however much of the request it reads."""
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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = {"redis_url": valkey_url, "var_dir": tmp_path_factory.mktemp("var"), "port": port}
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


@pytest.fixture
def stack(api: TestClient, settings: Settings, profile: DeviceProfile) -> Iterator[Stack]:
    runtime = Runtime.start(settings)
    runtime.announce_families()
    keep_profile(runtime.repository, profile)
    stack = Stack(api, runtime, Sampling(runtime))
    stack.heartbeat()
    yield stack
    stack.sampler.engine.stop()
