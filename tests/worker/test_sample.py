import io
import threading

import numpy as np
import pytest
from PIL import Image

import worker.runtime
import worker.sample
from registry.records import GenerationRecord
from registry.store import generation_name, image_file
from tests.worker.conftest import MakeGeneration, MakeModel
from worker.build import build
from worker.runtime import Runtime
from worker.sample import Sampler


@pytest.fixture
def ready(runtime: Runtime, make_model: MakeModel) -> str:
    model_id = make_model().id
    build(runtime, model_id)
    return model_id


def pictures(runtime: Runtime, record: GenerationRecord) -> list[np.ndarray]:
    names = [image_file(i) for i in range(len(record.seeds))]
    raw = [runtime.store.read(generation_name(record.id), name) for name in names]
    return [np.asarray(Image.open(io.BytesIO(png))) for png in raw]


def test_images_come_back_through_the_store(
    runtime: Runtime, ready: str, make_generation: MakeGeneration
) -> None:
    sampler = Sampler(runtime)
    first, again = make_generation(ready), make_generation(ready)
    for record in (first, again):
        sampler.generate(record.id)
    done = runtime.repository.generations.get(first.id)
    assert (done.status, done.revision) == ("done", 1)
    assert done.started_at is not None
    assert done.finished_at is not None
    images = pictures(runtime, done)
    assert [image.shape for image in images] == [(8, 8, 3)] * 6
    assert all(np.array_equal(*pair) for pair in zip(images, pictures(runtime, again), strict=True))


def test_batches_are_no_larger_than_the_budget_was_stated_for(
    runtime: Runtime,
    ready: str,
    make_generation: MakeGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[int] = []
    original = worker.sample.sample

    def count(
        model: object, diffusion: object, labels: list[int], *args: object, **kwargs: object
    ) -> object:
        batches.append(len(labels))
        return original(model, diffusion, labels, *args, **kwargs)

    monkeypatch.setattr(worker.sample, "sample", count)
    Sampler(runtime).generate(make_generation(ready, n=10).id)
    assert batches == [4, 4, 2]


def test_one_worker_serves_several_sizes_and_forgets_the_oldest(
    runtime: Runtime,
    make_model: MakeModel,
    make_generation: MakeGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.sample, "RESIDENT_MODELS", 1)
    sampler = Sampler(runtime)
    for mode, dtype in (("factored", "int8"), ("materialised", "bfloat16"), ("factored", None)):
        model_id = make_model(mode=mode, dtype=dtype).id
        build(runtime, model_id)
        record = make_generation(model_id, n=1)
        sampler.generate(record.id)
        assert runtime.repository.generations.get(record.id).status == "done"
    assert len(sampler._resident) == 1


def test_a_model_deleted_meanwhile_fails_its_requests(
    runtime: Runtime, ready: str, make_generation: MakeGeneration
) -> None:
    record = make_generation(ready)
    runtime.repository.models.change(ready, status="deleted")
    Sampler(runtime).generate(record.id)
    failed = runtime.repository.generations.get(record.id)
    assert (failed.status, failed.problem) == ("failed", "model-gone")
    assert failed.error == f"ModelGone: model {ready} is deleted"


def test_a_cancelled_generation_stops_between_steps(
    runtime: Runtime,
    ready: str,
    make_generation: MakeGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.runtime, "PROGRESS_SECONDS", 0)
    record = make_generation(ready, num_inference_steps=1000)
    thread = threading.Thread(target=Sampler(runtime).generate, args=(record.id,))
    thread.start()
    generations = runtime.repository.generations
    while generations.get(record.id).status != "running":
        pass
    generations.change(record.id, status="cancelled")
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert generations.get(record.id).status == "cancelled"


def test_shutdown_leaves_the_generation_to_the_next_worker(
    runtime: Runtime, ready: str, make_generation: MakeGeneration
) -> None:
    record = make_generation(ready)
    runtime.stopping.set()
    Sampler(runtime).generate(record.id)
    assert runtime.repository.generations.get(record.id).status == "running"
    runtime.stopping.clear()
    Sampler(runtime).generate(record.id)
    assert runtime.repository.generations.get(record.id).status == "done"
    Sampler(runtime).generate(record.id)
    assert runtime.repository.generations.get(record.id).attempts == 1
