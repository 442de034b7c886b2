"""A real server for the clients and the command line."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from registry.settings import Settings, get_settings
from service.app import make_app
from worker.runtime import Runtime

Configure = Callable[..., None]


@pytest.fixture
def url(settings: Settings, runtime: Runtime) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(settings), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Configure]:
    """Settings of the commands, which are those of their environment."""

    def change(**settings: object) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"FINESERVE_{name.upper()}", str(value))
        get_settings.cache_clear()

    monkeypatch.setattr("registry.logs.configure_logging", lambda _: None)
    change(var_dir=tmp_path / "var")
    yield change
    get_settings.cache_clear()


@pytest.fixture
def deployed(configure: Configure, settings: Settings) -> Settings:
    """Settings by which the commands see the Valkey and the families of this test."""
    configure(redis_url=settings.resolved_redis_url, families_dir=settings.families_dir)
    return settings


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]
