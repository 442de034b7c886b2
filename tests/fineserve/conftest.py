"""A real server for the command line, and a worker that takes what is queued."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from learngenes.family.family import Family
from learngenes.sizing.profile import DeviceProfile
from registry.settings import Settings
from service.app import make_app
from tests.support.builds import build
from tests.support.devices import keep_profile
from worker.runtime import Runtime
from worker.sampling.sample import Sampling


@pytest.fixture
def runtime(settings: Settings, family: Family, profile: DeviceProfile) -> Runtime:
    runtime = Runtime.start(settings)
    runtime.announce_families()
    keep_profile(runtime.repository, profile)
    return runtime


@pytest.fixture
def url(settings: Settings, runtime: Runtime) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(settings), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def working(runtime: Runtime) -> Iterator[None]:
    """Every record is worked on as soon as it is accepted."""
    stop = threading.Event()
    sampler = Sampling(runtime)
    repository = runtime.repository

    def work() -> None:
        while not stop.wait(0.01):
            for model in repository.models.active():
                build(runtime, model.id)
            for generation in repository.generations.active():
                sampler.generate(generation.id)

    thread = threading.Thread(target=work)
    thread.start()
    with contextlib.ExitStack() as ending:
        ending.callback(sampler.engine.stop)
        ending.callback(thread.join)
        ending.callback(stop.set)
        yield
