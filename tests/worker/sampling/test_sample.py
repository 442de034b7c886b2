import base64
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import numpy as np
import pytest
from PIL import Image

from learngenes.model.sampling import sample
from registry.errors import Superseded
from registry.events import stream_key
from registry.records import GenerationRecord, now
from registry.store import generation_name, image_file, served_name
from tests.support.builds import build
from tests.worker.conftest import MakeGeneration, MakeModel
from worker.artifacts import load_own
from worker.runtime import Runtime
from worker.sampling.jobs import EngineStopped, Job, SampleRequest
from worker.sampling.sample import Sampling, _target_seconds


@pytest.fixture
def ready(runtime: Runtime, make_model: MakeModel) -> str:
    model_id = make_model().id
    build(runtime, model_id)
    return model_id


@pytest.fixture
def often(runtime: Runtime) -> None:
    """Progress is told, and cancellations are looked for, all the time."""
    runtime.progress_seconds = 0.01


@pytest.fixture
def in_background() -> Iterator[Callable[..., threading.Thread]]:
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *args: object) -> threading.Thread:
        threads.append(threading.Thread(target=work, args=args))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def pictures(runtime: Runtime, record: GenerationRecord) -> list[np.ndarray]:
    names = [image_file(i) for i in range(len(record.seeds))]
    raw = [runtime.store.read(generation_name(record.id), name) for name in names]
    return [np.asarray(Image.open(io.BytesIO(png))) for png in raw]


def events(runtime: Runtime, record: GenerationRecord, name: str) -> list[dict[str, object]]:
    entries = runtime.repository._redis.xrange(stream_key("generation", record.id))
    return [json.loads(fields["data"]) for _, fields in entries if fields["event"] == name]


def until_running(runtime: Runtime, sampler: Sampling, record: GenerationRecord) -> None:
    while not (
        runtime.repository.generations.get(record.id).status == "running"
        and any(part.done_steps for part in list(sampler.engine._parts))
    ):
        time.sleep(0.001)


def test_images_come_back_through_the_store(
    runtime: Runtime, sampler: Sampling, ready: str, make_generation: MakeGeneration
) -> None:
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


def test_images_are_those_of_the_model_as_it_was_built(
    runtime: Runtime, sampler: Sampling, ready: str, make_generation: MakeGeneration
) -> None:
    record = make_generation(ready)
    sampler.generate(record.id)
    family = runtime.family("tiny")
    built = runtime.repository.models.get(ready)
    own = load_own(runtime.store, family, served_name(built))
    model = family.assemble(own, built.plan.mode, built.plan.dtype)
    alone = sample(
        model,
        family.manifest.diffusion,
        record.class_labels,
        record.seeds,
        num_inference_steps=record.num_inference_steps,
    )
    served = np.stack(pictures(runtime, record)).transpose(0, 3, 1, 2)
    assert np.abs(served.astype(int) - alone.numpy()).max() <= 1


def test_one_worker_serves_several_sizes_at_once(
    runtime: Runtime,
    sampler: Sampling,
    make_model: MakeModel,
    make_generation: MakeGeneration,
    in_background: Callable[..., threading.Thread],
) -> None:
    models = []
    for mode, dtype in (("factored", "int8"), ("materialised", "bfloat16"), ("factored", None)):
        models.append(make_model(mode=mode, dtype=dtype).id)
        build(runtime, models[-1])
    records = [make_generation(model_id, n=1, num_inference_steps=50) for model_id in models]
    threads = [in_background(sampler.generate, record.id) for record in records]
    for thread in threads:
        thread.join(timeout=20)
    statuses = [runtime.repository.generations.get(record.id).status for record in records]
    assert statuses == ["done"] * 3


def test_a_model_deleted_meanwhile_fails_its_requests(
    runtime: Runtime, sampler: Sampling, ready: str, make_generation: MakeGeneration
) -> None:
    record = make_generation(ready)
    runtime.repository.models.change(ready, status="deleted")
    sampler.generate(record.id)
    failed = runtime.repository.generations.get(record.id)
    assert (failed.status, failed.problem) == ("failed", "model-gone")
    assert failed.error == f"ModelGone: model {ready} is deleted"


def test_the_last_attempt_is_alone(
    runtime: Runtime,
    sampler: Sampling,
    ready: str,
    make_generation: MakeGeneration,
    in_background: Callable[..., threading.Thread],
) -> None:
    generations = runtime.repository.generations
    first, last = make_generation(ready), make_generation(ready, attempts=2)
    with runtime.leases.alone("last attempts"):  # somebody else's
        waiting = in_background(sampler.generate, last.id)
        sampler.generate(first.id)
        assert generations.get(first.id).status == "done"
        assert (generations.get(last.id).status, waiting.is_alive()) == ("queued", True)
    waiting.join(timeout=20)
    assert generations.get(last.id).status == "done"


def test_images_that_nobody_waits_for_any_more_are_not_made(
    runtime: Runtime, sampler: Sampling, ready: str, make_generation: MakeGeneration, often: None
) -> None:
    generations = runtime.repository.generations
    late = make_generation(ready, deadline=now() - timedelta(seconds=1))
    never = make_generation(
        ready, n=60, num_inference_steps=1000, deadline=now() + timedelta(seconds=0.2)
    )
    in_time = make_generation(ready, deadline=now() + timedelta(hours=1))
    for record in (late, never, in_time):
        sampler.generate(record.id)
    for record in (late, never):
        failed = generations.get(record.id)
        assert (failed.status, failed.problem) == ("failed", "deadline-missed")
    assert generations.get(late.id).started_at is None
    assert generations.get(in_time.id).status == "done"


def test_progress_is_told_with_a_preview_if_it_was_asked_for(
    runtime: Runtime, sampler: Sampling, ready: str, make_generation: MakeGeneration, often: None
) -> None:
    plain = make_generation(ready, n=1, num_inference_steps=400)
    shown = make_generation(ready, n=1, num_inference_steps=400, previews=True)
    for record in (plain, shown):
        sampler.generate(record.id)
    told = events(runtime, plain, "progress")
    assert all(event["steps"] == 400 and "b64_png" not in event for event in told)
    steps = [event["step"] for event in told]
    assert steps == sorted(steps)
    (*_, last) = (e for e in events(runtime, shown, "progress") if "b64_png" in e)
    preview = Image.open(io.BytesIO(base64.b64decode(str(last["b64_png"]))))
    assert preview.size == (8, 8)


class Waiting:
    """A job whose turn does not come, for so many looks."""

    progress = (0, 5)

    def __init__(self, looks: int) -> None:
        self._left = looks

    def wait(self, _: float) -> bool:
        self._left -= 1
        return self._left < 0


def test_nothing_is_told_of_a_request_that_only_waits(
    runtime: Runtime, sampler: Sampling, ready: str, make_generation: MakeGeneration
) -> None:
    runtime.progress_seconds = 0
    record = make_generation(ready)
    sampler._follow(Waiting(looks=20), record)
    assert events(runtime, record, "progress") == []


def test_a_request_that_waits_is_given_up_when_it_is_cancelled(
    runtime: Runtime,
    sampler: Sampling,
    ready: str,
    make_generation: MakeGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cancelled = []
    monkeypatch.setattr(sampler.engine, "cancel", cancelled.append)
    runtime.progress_seconds = 0
    record = make_generation(ready)
    runtime.repository.generations.change(record.id, status="cancelled")
    job = Waiting(looks=1)
    with pytest.raises(Superseded):
        sampler._follow(job, record)
    assert cancelled == [job]


def test_a_cancelled_generation_leaves_the_engine(
    runtime: Runtime,
    sampler: Sampling,
    ready: str,
    make_generation: MakeGeneration,
    often: None,
    in_background: Callable[..., threading.Thread],
) -> None:
    record = make_generation(ready, num_inference_steps=1000)
    thread = in_background(sampler.generate, record.id)
    until_running(runtime, sampler, record)
    runtime.repository.generations.change(record.id, status="cancelled")
    thread.join(timeout=20)
    assert runtime.repository.generations.get(record.id).status == "cancelled"
    following = make_generation(ready)
    sampler.generate(following.id)
    assert runtime.repository.generations.get(following.id).status == "done"
    assert not sampler.engine._parts


def test_shutdown_leaves_the_generation_to_the_next_worker(
    runtime: Runtime,
    sampler: Sampling,
    ready: str,
    make_generation: MakeGeneration,
    often: None,
    in_background: Callable[..., threading.Thread],
) -> None:
    record = make_generation(ready, num_inference_steps=1000)
    thread = in_background(sampler.generate, record.id)
    until_running(runtime, sampler, record)
    runtime.stopping.set()
    thread.join(timeout=20)
    assert runtime.repository.generations.get(record.id).status == "running"
    runtime.stopping.clear()
    sampler.generate(record.id)
    assert runtime.repository.generations.get(record.id).status == "done"
    sampler.generate(record.id)
    assert runtime.repository.generations.get(record.id).attempts == 1


def test_a_worker_whose_engine_broke_ends_so_that_its_work_is_taken_up_again(
    runtime: Runtime,
    sampler: Sampling,
    ready: str,
    make_generation: MakeGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(request: SampleRequest) -> Job:
        job = Job(request, None)
        job.fail(EngineStopped("the engine stopped"))
        return job

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(sampler.engine, "submit", broken)
    monkeypatch.setattr(os, "_exit", end)
    record = make_generation(ready)
    with pytest.raises(SystemExit):
        sampler.generate(record.id)
    assert runtime.repository.generations.get(record.id).status == "running"


def test_an_engine_that_takes_nothing_any_more_ends_its_worker(
    runtime: Runtime,
    sampler: Sampling,
    ready: str,
    make_generation: MakeGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(status: int) -> None:
        raise SystemExit(status)

    sampler.engine.stop()
    monkeypatch.setattr(os, "_exit", end)
    record = make_generation(ready)
    with pytest.raises(SystemExit):
        sampler.generate(record.id)
    assert runtime.repository.generations.get(record.id).status == "running"


def test_a_latency_budget_is_a_target_for_as_many_steps_and_images_as_are_asked_for(
    make_model: MakeModel, make_generation: MakeGeneration
) -> None:
    model = make_model(max_latency_ms=800, n=4, num_inference_steps=20)
    targets = [
        _target_seconds(make_generation(model.id, n=n, num_inference_steps=steps), model)
        for n, steps in ((1, 20), (4, 10), (8, 20))
    ]
    assert targets == pytest.approx([0.8, 0.4, 1.6])
    assert _target_seconds(make_generation(model.id), make_model()) is None
