import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from learngenes.config import Scheduler
from learngenes.family.family import Family
from learngenes.sizing.profile import DeviceProfile
from registry.events import stream_key
from registry.records import GenerationRecord, ModelRecord
from registry.settings import Settings
from tests.support.devices import keep_profile
from tests.support.engines import GatedEngine
from tests.support.records import queued_model
from worker.housekeeping import PATIENCE, Housekeeping, Patience
from worker.runtime import Runtime


@pytest.fixture
def runtime(settings: Settings, profile: DeviceProfile) -> Runtime:
    """A worker on a device that has its profile."""
    runtime = Runtime.start(settings)
    keep_profile(runtime.repository, profile)
    return runtime


def build_housekeeping(
    runtime: Runtime, patience: Patience = PATIENCE
) -> Housekeeping[ModelRecord]:
    models, stuck_seconds = runtime.repository.models, runtime.watch.stuck_seconds
    return Housekeeping(
        runtime, models, "build", "fineserve.build", stuck_seconds, patience=patience
    )


def told(
    runtime: Runtime, record_id: str, event: str, kind: str = "model"
) -> list[dict[str, object]]:
    """Data of a record's events of one name, in order."""
    entries = runtime.repository._redis.xrange(stream_key(kind, record_id))
    return [json.loads(fields["data"]) for _, fields in entries if fields["event"] == event]


MakeModel = Callable[..., ModelRecord]
MakeGeneration = Callable[..., GenerationRecord]


@pytest.fixture
def make_model(runtime: Runtime) -> MakeModel:
    """A queued model for this device; its plan is made when it is built."""

    def make(**changes: Any) -> ModelRecord:
        record = queued_model(**{"device_class": runtime.device_class, **changes})
        return runtime.repository.models.create(record)

    return make


@pytest.fixture
def make_generation(runtime: Runtime) -> MakeGeneration:
    def make(model: str, n: int = 6, **more: Any) -> GenerationRecord:
        briefly = {"num_inference_steps": 3, "guidance_scale": 2.0, "scheduler": Scheduler.DDIM}
        return runtime.repository.generations.create(
            GenerationRecord(
                id=GenerationRecord.new_id(),
                model=model,
                device_class=runtime.device_class,
                class_labels=[i % 5 for i in range(n)],
                seeds=list(range(n)),
                **{**briefly, **more},
            )
        )

    return make


@pytest.fixture
def engine(family: Family) -> Iterator[GatedEngine]:
    with GatedEngine(family) as engine:
        yield engine
