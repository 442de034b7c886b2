from collections.abc import Callable
from typing import Any

import pytest

from registry.records import GenerationRecord, ModelRecord
from registry.settings import Settings
from tests.records import queued_model
from worker.runtime import Runtime


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    return Runtime.start(settings)


MakeModel = Callable[..., ModelRecord]
MakeGeneration = Callable[..., GenerationRecord]


@pytest.fixture
def make_model(runtime: Runtime) -> MakeModel:
    """A queued model, as the service would leave it."""

    def make(**changes: Any) -> ModelRecord:
        return runtime.repository.models.create(queued_model(**changes))

    return make


@pytest.fixture
def make_generation(runtime: Runtime) -> MakeGeneration:
    def make(model: str, n: int = 6, num_inference_steps: int = 3) -> GenerationRecord:
        return runtime.repository.generations.create(
            GenerationRecord(
                id=GenerationRecord.new_id(),
                model=model,
                class_labels=[i % 5 for i in range(n)],
                seeds=list(range(n)),
                num_inference_steps=num_inference_steps,
                guidance_scale=2.0,
                scheduler="ddim",
            )
        )

    return make
