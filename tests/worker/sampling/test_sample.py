import base64
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from PIL import Image

from learngenes.model.sampling import sample
from learngenes.sizing.budget import Workload
from registry.errors import Superseded
from registry.records import GenerationRecord, now
from registry.settings import Settings
from registry.store import generation_name, image_file, served_name
from tests.support.builds import build
from tests.support.devices import beat
from tests.support.records import A_PLAN
from tests.worker.conftest import MakeGeneration, MakeModel, told
from worker.artifacts import load_own
from worker.runtime import Runtime
from worker.sampling.jobs import EngineStopped, Job, SampleRequest
from worker.sampling.requests import target_seconds
from worker.sampling.room import LEAST, Room
from worker.sampling.sample import Sampling


@dataclass
class Desk:
    """A sampler, a model that is ready, and what is asked of both."""

    sampler: Sampling
    model: str
    make_generation: MakeGeneration
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def runtime(self) -> Runtime:
        return self.sampler.runtime

    def ask(self, model: str | None = None, **request: Any) -> GenerationRecord:
        return self.make_generation(model or self.model, **request)

    def now(self, record: GenerationRecord) -> GenerationRecord:
        return self.runtime.repository.generations.get(record.id)

    def generate(self, record: GenerationRecord) -> GenerationRecord:
        self.sampler.generate(record.id)
        return self.now(record)

    def generate_in_background(self, record: GenerationRecord) -> threading.Thread:
        self.threads.append(threading.Thread(target=self.generate, args=(record,)))
        self.threads[-1].start()
        return self.threads[-1]

    def begin(self, **request: Any) -> tuple[GenerationRecord, threading.Thread]:
        """A request that runs, and the thread that makes its images."""
        record = self.ask(**request)
        thread = self.generate_in_background(record)
        while self.now(record).status != "running" or not any(
            part.done_steps for part in list(self.sampler.engine._parts)
        ):
            time.sleep(0.001)
        return record, thread

    def pictures(self, record: GenerationRecord) -> list[np.ndarray]:
        names = [image_file(i) for i in range(len(record.seeds))]
        raw = [self.runtime.store.read(generation_name(record.id), name) for name in names]
        return [np.asarray(Image.open(io.BytesIO(png))) for png in raw]

    def progress(self, record: GenerationRecord) -> list[dict[str, object]]:
        return told(self.runtime, record.id, "progress", "generation")


@pytest.fixture
def desk(
    runtime: Runtime, sampler: Sampling, make_model: MakeModel, make_generation: MakeGeneration
) -> Iterator[Desk]:
    desk = Desk(sampler, build(runtime, make_model().id).id, make_generation)
    yield desk
    for thread in desk.threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture
def often(runtime: Runtime) -> None:
    """Progress is told, and cancellations are looked for, all the time."""
    runtime.progress_seconds = 0.01


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the process raises SystemExit."""
    monkeypatch.setattr(os, "_exit", sys.exit)


def test_images_come_back_through_the_store(desk: Desk) -> None:
    done, again = (desk.generate(desk.ask()) for _ in range(2))
    assert (done.status, done.revision) == ("done", 1)
    assert done.started_at is not None
    assert done.finished_at is not None
    images = desk.pictures(done)
    assert [image.shape for image in images] == [(8, 8, 3)] * 6
    assert np.array_equal(images, desk.pictures(again))


def test_images_are_those_of_the_model_as_it_was_built(desk: Desk) -> None:
    record, family = desk.generate(desk.ask()), desk.runtime.family("tiny")
    built = desk.runtime.repository.models.get(desk.model)
    own = load_own(desk.runtime.store, family, served_name(built))
    model = family.assemble(own, built.plan.mode, built.plan.dtype)
    alone = sample(
        model,
        family.manifest.diffusion,
        record.class_labels,
        record.seeds,
        num_inference_steps=record.num_inference_steps,
    )
    served = np.stack(desk.pictures(record)).transpose(0, 3, 1, 2)
    assert np.abs(served.astype(int) - alone.numpy()).max() <= 1


def test_one_worker_serves_several_sizes_at_once(desk: Desk, make_model: MakeModel) -> None:
    sizes = (("factored", "int8"), ("materialised", "bfloat16"), ("factored", None))
    models = [make_model(mode=mode, dtype=dtype).id for mode, dtype in sizes]
    for model in models:
        build(desk.runtime, model)
    records = [desk.ask(model, n=1, num_inference_steps=50) for model in models]
    for thread in [desk.generate_in_background(record) for record in records]:
        thread.join(timeout=20)
    assert [desk.now(record).status for record in records] == ["done"] * 3


def test_a_model_deleted_meanwhile_fails_its_requests(desk: Desk) -> None:
    record = desk.ask()
    desk.runtime.repository.models.change(desk.model, status="deleted")
    failed = desk.generate(record)
    assert (failed.status, failed.problem) == ("failed", "model-gone")
    assert failed.error == f"ModelGone: model {desk.model} is deleted"


def test_the_last_attempt_is_alone(desk: Desk) -> None:
    first, last = desk.ask(), desk.ask(attempts=2)
    with desk.runtime.leases.alone("last attempts"):  # somebody else's
        waiting = desk.generate_in_background(last)
        assert desk.generate(first).status == "done"
        assert (desk.now(last).status, waiting.is_alive()) == ("queued", True)
    waiting.join(timeout=20)
    assert desk.now(last).status == "done"


def test_images_that_nobody_waits_for_any_more_are_not_made(desk: Desk, often: None) -> None:
    soon = now() + timedelta(seconds=0.2)
    late = desk.ask(deadline=now() - timedelta(seconds=1))
    never = desk.ask(n=60, num_inference_steps=1000, deadline=soon)
    in_time = desk.ask(deadline=now() + timedelta(hours=1))
    late, never, in_time = map(desk.generate, (late, never, in_time))
    for failed in (late, never):
        assert (failed.status, failed.problem) == ("failed", "deadline-missed")
    assert late.started_at is None
    assert in_time.status == "done"


def test_progress_is_told_with_a_preview_if_it_was_asked_for(desk: Desk, often: None) -> None:
    plain, shown = (
        desk.generate(desk.ask(n=1, num_inference_steps=400, previews=previews))
        for previews in (False, True)
    )
    progress = desk.progress(plain)
    assert all(event["steps"] == 400 and "b64_png" not in event for event in progress)
    steps = [event["step"] for event in progress]
    assert steps == sorted(steps)
    (*_, last) = (event for event in desk.progress(shown) if "b64_png" in event)
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


def test_nothing_is_told_of_a_request_that_only_waits(desk: Desk) -> None:
    desk.runtime.progress_seconds = 0
    record = desk.ask()
    desk.sampler._follow(Waiting(looks=20), record)
    assert desk.progress(record) == []


def test_a_request_that_waits_is_given_up_when_it_is_cancelled(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = []
    monkeypatch.setattr(desk.sampler.engine, "cancel", cancelled.append)
    desk.runtime.progress_seconds = 0
    record = desk.ask()
    desk.runtime.repository.generations.change(record.id, status="cancelled")
    job = Waiting(looks=1)
    with pytest.raises(Superseded):
        desk.sampler._follow(job, record)
    assert cancelled == [job]


def test_what_waits_goes_back_to_the_queue_where_another_worker_has_nothing_to_do(
    desk: Desk, often: None
) -> None:
    _, begun = desk.begin(num_inference_steps=1000)
    waiting = Waiting(looks=10**6)
    records = [desk.ask() for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk.sampler.engine, "submit", lambda request: waiting)
        patch.setattr(desk.sampler.engine, "cancel", lambda job: None)
        threads = [desk.generate_in_background(record) for record in records]
        while any(desk.now(record).status != "running" for record in records):
            time.sleep(0.01)
        desk.sampler.room = Room(desk.runtime, lambda: {"engine_waiting": 3, "engine_running": 1})
        beat(desk.runtime, queue="sample", gauges={"engine_running": 5, "engine_waiting": 0})
        desk.sampler.room.look_around()
        time.sleep(0.1)
        assert desk.runtime.queue.length("sample", desk.runtime.device_class) == 0, "it works"
        beat(desk.runtime, queue="sample", gauges={"engine_running": 0, "engine_waiting": 0})
        desk.sampler.room.look_around()
        while desk.runtime.queue.length("sample", desk.runtime.device_class) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        assert desk.runtime.queue.length("sample", desk.runtime.device_class) == 2, "half of them"
        given_back = [
            record
            for record in records
            if not desk.runtime.repository.generations.leased(record.id)
        ]
        assert {desk.now(record).attempts for record in given_back} == {0}
        desk.runtime.stopping.set()
        for thread in (begun, *threads):
            thread.join(timeout=20)
    desk.runtime.stopping.clear()
    assert desk.generate(given_back[0]).status == "done"


def test_a_cancelled_generation_leaves_the_engine(desk: Desk, often: None) -> None:
    record, thread = desk.begin(num_inference_steps=1000)
    desk.runtime.repository.generations.change(record.id, status="cancelled")
    thread.join(timeout=20)
    assert desk.now(record).status == "cancelled"
    assert desk.generate(desk.ask()).status == "done"
    assert not desk.sampler.engine._parts


def test_shutdown_leaves_the_generation_to_the_next_worker(desk: Desk, often: None) -> None:
    record, thread = desk.begin(num_inference_steps=1000)
    desk.runtime.stopping.set()
    thread.join(timeout=20)
    assert desk.now(record).status == "running"
    desk.runtime.stopping.clear()
    assert desk.generate(record).status == "done"
    assert desk.generate(record).attempts == 1


def test_a_worker_whose_engine_broke_ends_so_that_its_work_is_taken_up_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, ended: None
) -> None:
    def broken(request: SampleRequest) -> Job:
        job = Job(request, None)
        job.fail(EngineStopped("the engine stopped"))
        return job

    monkeypatch.setattr(desk.sampler.engine, "submit", broken)
    record = desk.ask()
    with pytest.raises(SystemExit):
        desk.generate(record)
    assert desk.now(record).status == "running"


def test_an_engine_that_takes_nothing_any_more_ends_its_worker(desk: Desk, ended: None) -> None:
    desk.sampler.engine.stop()
    record = desk.ask()
    with pytest.raises(SystemExit):
        desk.generate(record)
    assert desk.now(record).status == "running"


def test_a_latency_budget_is_a_target_for_as_many_steps_and_images_as_are_asked_for(
    make_model: MakeModel, make_generation: MakeGeneration
) -> None:
    planned = replace(A_PLAN, sampling=Workload.of(num_inference_steps=20).sampling)
    model = make_model(max_latency_ms=800, n=4, num_inference_steps=20, plan=planned)
    targets = [
        target_seconds(make_generation(model.id, n=n, num_inference_steps=steps), model)
        for n, steps in ((1, 20), (4, 10), (8, 20))
    ]
    assert targets == pytest.approx([0.8, 0.4, 1.6])
    assert target_seconds(make_generation(model.id), make_model()) is None


def test_one_of_several_workers_takes_what_it_has_room_for(runtime: Runtime) -> None:
    engine = {"engine_running": 0, "engine_waiting": 0}
    room = Room(runtime, lambda: engine)
    room.look_around()
    assert room.for_another(1000), "alone it takes what there is"
    beat(runtime, queue="build")
    beat(runtime, id="elsewhere", queue="sample", device_class="another")
    room.look_around()
    assert room.for_another(1000), "no peer of it"
    beat(runtime, id="peer", queue="sample")
    room.look_around()
    assert [room.for_another(taken) for taken in (0, LEAST - 1, LEAST)] == [True, True, False]
    engine["engine_running"] = 20
    assert [room.for_another(taken) for taken in (39, 40)] == [True, False]
    runtime.repository.take_back_heartbeat("peer")
    room.look_around()
    assert room.for_another(1000)


def test_where_workers_come_on_demand_the_queue_tells_how_many_are_needed(
    settings: Settings,
) -> None:
    runtime = Runtime.start(settings.model_copy(update={"workers_on_demand": True}))
    room = Room(runtime, dict)
    room.look_around()
    assert not room.for_another(LEAST)
