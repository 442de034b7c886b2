from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fastapi.testclient import TestClient

from registry.settings import Settings
from service.app import make_app
from worker.build import build
from worker.runtime import Runtime
from worker.sample import Sampler


@dataclass
class Stack:
    """The API over real HTTP semantics, and a worker that works when told to."""

    api: TestClient
    runtime: Runtime
    sampler: Sampler

    def make_model(self, max_mem_gb: float = 4) -> str:
        answer = self.api.post("/models", json={"max_mem_gb": max_mem_gb})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ready_model(self, max_mem_gb: float = 4) -> str:
        model_id = self.make_model(max_mem_gb)
        build(self.runtime, model_id)
        return model_id


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    """The API alone: no worker has said anything."""
    with TestClient(make_app(settings)) as api:
        yield api


@pytest.fixture
def stack(api: TestClient, settings: Settings) -> Stack:
    runtime = Runtime.start(settings)
    runtime.announce_families()
    return Stack(api, runtime, Sampler(runtime))
