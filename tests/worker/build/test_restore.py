import os
import time
from pathlib import Path

import pytest
import redis

from registry.errors import RecordNotFound
from registry.records import ModelRecord
from registry.store import MANIFEST, generation_name, image_file, record_name, served_name
from tests.support.builds import build
from tests.worker.conftest import MakeGeneration, MakeModel
from worker.build.restore import ABANDONED_SECONDS, restore
from worker.runtime import Runtime
from worker.sampling.sample import Sampling


@pytest.fixture
def ready(runtime: Runtime, make_model: MakeModel) -> ModelRecord:
    return build(runtime, make_model().id)


def left_long_ago(runtime: Runtime) -> Path:
    """The one directory of a model, as if nothing had touched it for a while."""
    (model_id,) = runtime.store.ids("models")
    directory = runtime.store.root / "models" / model_id
    long_ago = time.time() - ABANDONED_SECONDS - 1
    for path in (directory, *directory.iterdir()):
        os.utime(path, (long_ago, long_ago))
    return directory


def restored(runtime: Runtime) -> int:
    return restore(runtime.store, runtime.repository.models)


def test_a_ready_model_outlives_redis(
    runtime: Runtime,
    ready: ModelRecord,
    client: redis.Redis,
    sampler: Sampling,
    make_generation: MakeGeneration,
) -> None:
    client.flushall()
    assert restored(runtime) == 1
    assert runtime.repository.models.get(ready.id) == ready
    (listed,) = runtime.repository.models.page(0, 9, ready.owner).items
    assert listed.id == ready.id
    assert runtime.repository.models.count_active() == 0
    generation = make_generation(ready.id)
    sampler.generate(generation.id)
    assert runtime.repository.generations.get(generation.id).status == "done"
    assert restored(runtime) == 0


def test_what_was_deleted_stays_so(runtime: Runtime, ready: ModelRecord) -> None:
    runtime.repository.models.change(ready.id, status="deleted")
    assert restored(runtime) == 0
    assert runtime.store.ids("models") == []


def test_what_was_cancelled_at_the_last_moment_does_not_come_back(
    runtime: Runtime, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, client: redis.Redis
) -> None:
    model, replace = make_model(), runtime.store.replace_description

    def cancelled(name: str, description: dict[str, object]) -> None:
        replace(name, description)
        runtime.repository.models.change(model.id, status="cancelled")

    monkeypatch.setattr(runtime.store, "replace_description", cancelled)
    build(runtime, model.id)
    client.flushall()
    assert restored(runtime) == 0


def test_what_an_overtaken_attempt_has_left_is_put_right(
    runtime: Runtime, ready: ModelRecord, make_model: MakeModel, client: redis.Redis
) -> None:
    cancelled = make_model()
    runtime.repository.models.change(cancelled.id, status="cancelled")
    for record in (ready, cancelled):
        other = record.replace(status="ready", revision=7).model_dump(mode="json")
        runtime.store.replace_description(record_name(record.id), {"record": other})
    assert restored(runtime) == 0
    client.flushall()
    assert restored(runtime) == 1
    assert runtime.repository.models.get(ready.id) == ready


def test_a_model_of_an_earlier_release_is_sampled_as_before(
    runtime: Runtime,
    ready: ModelRecord,
    client: redis.Redis,
    sampler: Sampling,
    make_generation: MakeGeneration,
) -> None:
    def images() -> list[bytes]:
        record = make_generation(ready.id)
        sampler.generate(record.id)
        return [runtime.store.read(generation_name(record.id), image_file(i)) for i in range(6)]

    before = images()
    folder = runtime.store.root / served_name(ready)
    folder.rename(folder.parent / "revision-1")
    record = ready.model_dump(mode="json", exclude={"artifact"})
    runtime.store.delete(record_name(ready.id))
    runtime.store.put(record_name(ready.id), {}, {"record": record})
    client.flushall()
    assert restored(runtime) == 1
    assert runtime.repository.models.get(ready.id) == ready.replace(artifact=None)
    assert images() == before


@pytest.mark.parametrize("content", ["{", "{}", '{"record": {"id": "m-1"}}'])
def test_a_record_that_cannot_be_read_is_left_alone(
    runtime: Runtime, ready: ModelRecord, client: redis.Redis, content: str
) -> None:
    (runtime.store.root / record_name(ready.id) / MANIFEST).write_text(content)
    client.flushall()
    assert restored(runtime) == 0
    with pytest.raises(RecordNotFound):
        runtime.repository.models.get(ready.id)
    directory = left_long_ago(runtime)
    restored(runtime)
    assert runtime.store.ids("models") == [directory.name]  # it was finished, and stays


def test_what_an_unfinished_build_has_left_goes_after_a_while(
    runtime: Runtime, make_model: MakeModel, client: redis.Redis
) -> None:
    runtime.store.put(f"models/{make_model().id}/revision-0", {"own.safetensors": b""}, {})
    client.flushall()
    assert restored(runtime) == 0
    left_long_ago(runtime)
    restored(runtime)
    assert runtime.store.ids("models") == []
