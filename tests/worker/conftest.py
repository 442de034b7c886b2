from collections.abc import Callable

import pytest

from registry.records import (
    Budget,
    GenerationRecord,
    ModelRecord,
    PlanRecord,
    Predicted,
)
from registry.settings import Settings
from worker.runtime import Runtime


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    return Runtime.start(settings)


MakeModel = Callable[..., ModelRecord]
MakeGeneration = Callable[..., GenerationRecord]


@pytest.fixture
def make_model(runtime: Runtime) -> MakeModel:
    """A queued model, as the service would leave it."""

    def make(
        max_mem_gb: float = 1.0, family: str = "tiny", mode: str = "materialised"
    ) -> ModelRecord:
        return runtime.repository.models.create(
            ModelRecord(
                id=ModelRecord.new_id(),
                name="a model",
                family=family,
                budget=Budget(max_mem_gb=max_mem_gb, n=4, num_inference_steps=2),
                plan=PlanRecord(
                    depth=3,
                    rank=24,
                    mode=mode,
                    dtype="float32",
                    n=4,
                    predicted=Predicted(memory_bytes=1, latency_seconds=None),
                ),
            )
        )

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
