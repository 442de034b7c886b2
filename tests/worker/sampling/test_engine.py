import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from learngenes.config import SHARED_MODES, DType, Mode, Scheduler, Size
from learngenes.family.family import Family
from learngenes.measuring.steps import SecondsOf, StepCosts, batch_of, own_model
from learngenes.model.factors import Scales
from learngenes.stepping import arithmetic
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.weights import SharedWeights
from tests.support.engines import (
    FULL_ROWS,
    SECONDS,
    GatedEngine,
    Model,
    Undisturbed,
    alone,
    images_of,
    random_model,
    reference,
    room_for,
    same,
    undisturbed,
    wait_until,
)
from worker.sampling.jobs import EngineStopped

GUIDANCE: list[dict[str, Any]] = [
    {},
    {"guidance_start": 0.25, "guidance_stop": 0.75},
    {"guide": Size(depth=1, rank=8)},
    {"guide": Size(depth=1, rank=8), "guidance_stop": 0.5},
]


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_come_and_go_together_get_the_images_they_get_alone(
    engine: GatedEngine, seed: int
) -> None:
    generator = random.Random(seed)
    models = [random_model(generator) for _ in range(7)]
    requests = [
        engine.ask(
            generator.choice(models),
            images=(images := generator.randint(1, 4)),
            class_labels=[generator.randrange(5) for _ in range(images)],
            seeds=[generator.randrange(10_000) for _ in range(images)],
            num_inference_steps=generator.randint(1, 12) if i else 100,
            guidance_scale=generator.choice([1.0, 1.5, 4.0]),
            **generator.choice(GUIDANCE),
            scheduler=generator.choice([*Scheduler]),
            owner=generator.choice("ab"),
            target_seconds=generator.choice([0.01, 1.0, None]),
        )
        for i in range(20)
    ]
    engine.gate.close()
    jobs, cancelled = [], set()
    for i, request in enumerate(requests):
        jobs.append(engine.submit(request))
        if i == 0:
            engine.gate.reached()
        elif generator.random() < 0.5:
            engine.gate.allow(generator.randint(1, 4))
        if i and generator.random() < 0.25:
            chosen = generator.choice(jobs[1:])
            cancelled.add(chosen)
            engine.cancel(chosen)
    engine.gate.open()
    finished = []
    for request, job in zip(requests, jobs, strict=True):
        assert job.wait(SECONDS)
        if job in cancelled and isinstance(job.error, EngineStopped):
            continue
        finished.append((request, job.images()))
    assert len(finished) >= 10
    assert max(engine.gate.sizes) > 4  # they did run together
    wrong = [request for request, images in finished if not same(alone(engine, request), images)]
    assert wrong == []


@pytest.mark.parametrize("mode", SHARED_MODES)
@pytest.mark.parametrize("scheduler", Scheduler)
def test_images_are_those_of_the_models_own_network(
    engine: GatedEngine, mode: Mode, scheduler: Scheduler
) -> None:
    model = Model(mode=mode)
    for guidance in GUIDANCE:
        request = engine.ask(model, 3, scheduler=scheduler, **guidance)
        difference = np.stack(alone(engine, request)) - reference(engine.family, model, request)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_more_images_than_fit_in_a_batch_come_whole_and_in_order(
    engine: GatedEngine, guidance_scale: float
) -> None:
    request = engine.ask(images=20, guidance_scale=guidance_scale)
    images = alone(engine, request)
    assert max(engine.gate.sizes) == FULL_ROWS // request.rows_per_image
    single = [
        alone(engine, engine.ask(class_labels=[label], seeds=[seed], guidance_scale=guidance_scale))
        for label, seed in zip(request.class_labels, request.seeds, strict=True)
    ]
    assert same(images, [image for (image,) in single])


def test_one_image_may_be_larger_than_a_batch(family: Family) -> None:
    costs = StepCosts((1,), (0.001,), 1, 1, {48: 2.0})
    with GatedEngine(family, measure_steps=lambda *_, **__: costs) as engine:
        assert len(alone(engine, engine.ask(images=3))) == 3


def test_many_models_share_a_device_that_has_room_for_some(engine: GatedEngine) -> None:
    generator = random.Random(0)
    models = [
        Model(seed, generator.choice((2, 3, 4)), generator.choice((8, 24, 48)), mode)
        for seed, mode in ((seed, generator.choice(SHARED_MODES)) for seed in range(120))
    ]
    room_for(engine, 800_000)  # their Sigma are as much, their W ten times that
    asked = generator.sample(models, 120) + generator.choices(models, k=24)
    requests = [
        engine.ask(model, 1, num_inference_steps=2, guidance_scale=1.0, seeds=[i])
        for i, model in enumerate(asked)
    ]
    engine.gate.close()
    jobs = [engine.submit(request) for request in requests]
    engine.gate.open()
    images = [images_of(job) for job in jobs]
    worst = max(
        np.abs(images[i][0] - reference(engine.family, asked[i], requests[i])[0]).max()
        for i in range(0, len(asked), 6)  # a reference takes longer than an image
    )
    assert worst <= 1
    assert len([m for m in models if engine.residency.knows((str(m), 0))]) < 116


# Coming and going


def test_a_short_request_that_comes_during_a_long_one_is_done_first(engine: GatedEngine) -> None:
    long, short = engine.hold(engine.ask(num_inference_steps=100), engine.ask(Model(1)))
    engine.gate.allow(6)
    assert short.wait(SECONDS)
    assert not long.done
    assert 3 <= long.progress[0] <= 7
    assert undisturbed(engine, long, short)


def test_a_cancelled_request_leaves_the_others_as_they_are(engine: GatedEngine) -> None:
    jobs = engine.hold(*(engine.ask(Model(i), num_inference_steps=8) for i in range(3)))
    engine.gate.allow(3)
    engine.cancel(jobs[1])
    engine.gate.allow(2)
    assert jobs[1].done
    with pytest.raises(EngineStopped, match="cancelled"):
        jobs[1].images()
    assert undisturbed(engine, jobs[0], jobs[2])


def test_a_request_can_be_cancelled_before_it_has_begun(engine: GatedEngine) -> None:
    first, second = engine.hold(engine.ask(images=6), engine.ask(Model(1), images=6))
    engine.cancel(second)
    engine.gate.open()
    with pytest.raises(EngineStopped):
        images_of(second)
    assert len(images_of(first)) == 6


def test_cancelling_what_is_done_changes_nothing(engine: GatedEngine) -> None:
    job = engine.begin()
    images = images_of(job)
    engine.cancel(job)
    alone(engine, engine.ask(Model(1)))
    assert job.error is None
    assert same(job.images(), images)


def test_a_cancelled_request_of_several_batches_ends_as_a_whole(engine: GatedEngine) -> None:
    (job,) = engine.hold(engine.ask(images=20))
    engine.gate.allow(4)  # one batch of three steps, and some of the next
    engine.cancel(job)
    engine.gate.open()
    with pytest.raises(EngineStopped):
        images_of(job)
    assert len(alone(engine, engine.ask(Model(1)))) == 2


def test_progress_counts_steps(engine: GatedEngine) -> None:
    (job,) = engine.hold(engine.ask(num_inference_steps=9))
    assert job.progress == (0, 9)
    engine.gate.allow(4)
    assert job.progress == (4, 9)


def test_a_model_is_loaded_once(engine: GatedEngine) -> None:
    loads = []

    def load() -> Scales:
        loads.append(threading.current_thread())
        return Model().scales(engine.family)

    for _ in range(3):
        alone(engine, engine.ask(load=load))
    assert loads == [threading.current_thread()]
    alone(engine, engine.ask(load=load, artifact="revision-1"))
    assert len(loads) == 2


def test_the_end_of_the_engine_is_the_end_of_its_requests(engine: GatedEngine) -> None:
    jobs = engine.hold(*(engine.ask(Model(i), 6, num_inference_steps=50) for i in range(4)))
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(engine.stop)
        engine.gate.open()
        stopped.result(SECONDS)
    for job in jobs:
        with pytest.raises(EngineStopped, match="stopped"):
            images_of(job)
    with pytest.raises(EngineStopped, match="not running"):
        engine.begin()


def test_requests_may_come_from_many_threads(engine: GatedEngine) -> None:
    requests = [engine.ask(Model(i % 4), 1, seeds=[i]) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda request: alone(engine, request), requests))
    for request, ours in zip(requests, images, strict=True):
        assert same(ours, alone(engine, request))


# Previews


def test_a_preview_is_what_an_image_is_taken_to_be(engine: GatedEngine) -> None:
    job = engine.begin(num_inference_steps=250)
    while (preview := engine.preview(job, SECONDS)) is None:
        assert not job.done
    assert preview.shape == (3, 8, 8)
    assert preview.dtype == np.uint8
    while not job.done:
        engine.preview(job, SECONDS)
    assert undisturbed(engine, job)


def test_there_is_no_preview_before_the_first_step_or_after_the_last(engine: GatedEngine) -> None:
    first, waiting = engine.hold(engine.ask(images=6), engine.ask(Model(1), images=6))
    assert engine.preview(waiting, 0.01) is None
    engine.gate.open()
    images_of(first)
    images_of(waiting)
    assert engine.preview(waiting, SECONDS) is None


def test_an_owner_of_one_request_does_not_wait_for_anothers_many(engine: GatedEngine) -> None:
    """Each request is a full batch of 16 steps."""
    owners = [*["many"] * 8, "one"]
    *many, one = engine.hold(
        *(engine.ask(Model(i), 6, num_inference_steps=16, owner=o) for i, o in enumerate(owners))
    )
    engine.gate.allow(48)
    assert one.done
    assert sum(job.done for job in many) <= 3
    engine.gate.open()
    assert all(len(images_of(job)) == 6 for job in many)


def test_of_one_owner_the_request_that_is_due_first_is_first(engine: GatedEngine) -> None:
    late, early = engine.hold(
        engine.ask(Model(0), 6, num_inference_steps=40),
        engine.ask(Model(1), 6, num_inference_steps=8, target_seconds=5),
    )
    engine.gate.allow(10)
    assert early.done
    assert not late.done
    engine.gate.open()
    assert len(images_of(late)) == 6


@pytest.mark.parametrize(("target_seconds", "images"), [(None, 8), (24.0, 4), (12.0, 2)])
def test_a_full_batch_is_late_for_nobody_but_those_with_a_target(
    family: Family, target_seconds: float | None, images: int
) -> None:
    costs = StepCosts((4, 16), (1.0, 20.0), 16, 1, {48: 2.0})  # three steps of 8 rows: 22 s
    with GatedEngine(family, measure_steps=lambda *_, **__: costs) as engine:
        asked = (engine.ask(Model(seed), target_seconds=target_seconds) for seed in range(4))
        jobs = engine.hold(*asked)
        engine.gate.allow(2)
        assert engine.gate.sizes[-1] == images
        engine.gate.open()
        assert all(len(images_of(job)) == 2 for job in jobs)


def costs_of(seconds: float) -> StepCosts:
    return StepCosts((1, 64), (seconds, seconds), 4, 1, {48: 2.0})


class Measuring:
    """In place of measuring: quick or thorough, and as long as steps are wanted."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.thorough = 0

    def __call__(
        self,
        shared: SharedWeights,
        kernels: Kernels,
        max_rows: int,
        max_seconds: float = 5.0,
        seconds_of: SecondsOf | None = None,
    ) -> StepCosts:
        if seconds_of is None:
            return costs_of(10)
        model = own_model(shared, 24, materialised=True)
        batch = batch_of([model], 1, kernels)
        self.begun.set()
        while not self.may_end.is_set():
            seconds_of(batch, 1)
            batch = batch_of([model], 1, kernels)
        self.thorough += 1
        return costs_of(1)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    monkeypatch.setattr("worker.sampling.engine.IDLE_SECONDS", 0.05)
    return Measuring()


def test_what_a_step_costs_is_measured_in_a_hurry_and_again_when_nobody_waits(
    family: Family, measuring: Measuring
) -> None:
    with GatedEngine(family, measure_steps=measuring) as engine:
        assert engine.costs == {}
        images_of(engine.begin())
        key = family.fingerprint, torch.float32
        assert engine.costs == {key: costs_of(10)}
        assert measuring.begun.wait(SECONDS)
        assert len(images_of(engine.begin())) == 2  # who comes meanwhile does not wait
        assert engine.costs == {key: costs_of(10)}
        measuring.may_end.set()
        wait_until(lambda: engine.costs == {key: costs_of(1)})
    assert measuring.thorough == 1


def test_measuring_ends_where_another_wants_the_device(
    family: Family, measuring: Measuring
) -> None:
    wanted = threading.Event()
    with GatedEngine(family, measure_steps=measuring, others_wait=wanted.is_set) as engine:
        images_of(engine.begin())
        assert measuring.begun.wait(SECONDS)
        wanted.set()
        for _ in range(2):  # it is begun anew, and ended again
            measuring.begun.clear()
            assert measuring.begun.wait(SECONDS)
        assert measuring.thorough == 0
        wanted.clear()
        measuring.may_end.set()
        wait_until(lambda: measuring.thorough == 1)


def test_nothing_is_measured_while_another_has_the_device(
    family: Family, measuring: Measuring
) -> None:
    free, asked = threading.Event(), threading.Semaphore(0)

    def alone() -> AbstractContextManager[bool]:
        asked.release()
        return nullcontext(free.is_set())

    measuring.may_end.set()
    with GatedEngine(family, measure_steps=measuring, alone=alone) as engine:
        images_of(engine.begin())
        for _ in range(3):
            assert asked.acquire(timeout=SECONDS)
        assert measuring.thorough == 0
        free.set()
        wait_until(lambda: measuring.thorough == 1)


def test_what_cannot_be_measured_is_served_all_the_same(
    family: Family, measuring: Measuring
) -> None:
    tried = threading.Event()

    def broken(*arguments: Any, seconds_of: SecondsOf | None = None) -> StepCosts:
        if seconds_of is None:
            return costs_of(10)
        tried.set()
        raise MemoryError

    with GatedEngine(family, measure_steps=broken) as engine:
        images_of(engine.begin())
        assert tried.wait(SECONDS)
        assert len(images_of(engine.begin())) == 2


def test_other_kernels_take_over_between_two_steps(engine: GatedEngine) -> None:
    calls = 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return arithmetic.embed(*arguments)

    expected = alone(engine, engine.ask(num_inference_steps=6))
    (job,) = engine.hold(engine.ask(num_inference_steps=6))
    engine.gate.allow(2)
    kernels = Kernels(embed=counted, lanes=engine.lanes)
    engine.use(engine.family, torch.float32, kernels)
    engine.gate.allow(1)
    engine.gate.open()
    assert same(images_of(job), expected)
    assert 1 <= calls <= 4


def test_progress_ends_at_its_end(engine: GatedEngine) -> None:
    (job,) = engine.hold(engine.ask(images=20))
    seen = [job.progress]
    for _ in range(11):
        engine.gate.allow(1)
        seen.append(job.progress)
    engine.gate.open()
    images_of(job)
    seen.append(job.progress)
    assert seen == sorted(seen)
    assert seen[-1] == (12, 12)


def test_models_that_ran_together_leave_room_for_others(engine: GatedEngine) -> None:
    for i in range(12):
        alone(engine, engine.ask(Model(i, 4), 1))
    pool = engine.pool
    model = next(iter(pool.models.values()))
    own, w = model.nbytes, model.materialised_nbytes
    pool.models.clear()
    room_for(engine, 12 * own + 13 * w)
    jobs = engine.hold(*(engine.ask(Model(i, 4), 1, guidance_scale=1.0) for i in range(12)))
    engine.gate.open()
    for job in jobs:
        images_of(job)
    assert len(alone(engine, engine.ask(Model(99), 1))) == 1
    assert engine.residency.nbytes <= engine.residency.budget_bytes


def test_an_idle_engine_says_so(engine: GatedEngine) -> None:
    assert engine.begin().wait(SECONDS)
    ends = time.monotonic() + SECONDS
    while engine.gauges["engine_running"] and time.monotonic() < ends:
        time.sleep(0.001)
    assert engine.gauges["engine_running"] == engine.gauges["engine_waiting"] == 0


def test_weights_that_nobody_asks_for_leave_the_device_and_come_back(family: Family) -> None:
    with GatedEngine(family, idle_release_seconds=0.2) as engine:
        before = images_of(engine.begin())
        assert engine.residency.models == 1
        wait_until(lambda: engine.residency.pools == [])
        assert engine.residency.nbytes == 0
        assert same(images_of(engine.begin()), before)


def test_what_is_asked_for_stays_while_others_leave(family: Family) -> None:
    with GatedEngine(family, idle_release_seconds=0.5) as engine:
        images_of(engine.begin(Model(dtype=DType.BFLOAT16)))
        for _ in range(20):
            images_of(engine.begin())
            time.sleep(0.05)
        assert [pool.shared.dtype for pool in engine.residency.pools] == [DType.FLOAT32]


def test_weights_stay_where_nothing_else_is_said(family: Family, measuring: Measuring) -> None:
    measuring.may_end.set()
    with GatedEngine(family, measure_steps=measuring) as engine:
        images_of(engine.begin())
        wait_until(lambda: measuring.thorough == 1)
        assert engine.residency.models == 1


def test_what_was_measured_beside_others_is_measured_again_ever_later(
    family: Family, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.sampling.engine.AGAIN_SECONDS", 0.05)
    said = iter(["other processes", "other processes", ""])
    measuring.may_end.set()
    began: list[float] = []

    def quiet(device: torch.device) -> Undisturbed:
        began.append(time.monotonic())
        return Undisturbed(device, next(said))

    with GatedEngine(family, measure_steps=measuring, quiet=quiet) as engine:
        images_of(engine.begin())
        key = family.fingerprint, torch.float32
        assert engine.costs == {key: costs_of(10)}
        wait_until(lambda: measuring.thorough == 3)
        wait_until(lambda: engine.costs == {key: costs_of(1)})
        assert engine.is_measured(*key)
    first, second, third = began[:3]
    assert second - first >= 0.05
    assert third - second >= 2 * 0.05


def test_a_moment_of_the_machine_is_not_believed_alone(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("IDLE_SECONDS", "APART_SECONDS"):
        monkeypatch.setattr(f"worker.sampling.engine.{name}", 0.05)
    found = iter([costs_of(30), costs_of(10), costs_of(20)])

    def measured(*_: object, seconds_of: object = None) -> StepCosts:
        return costs_of(99) if seconds_of is None else next(found)

    with GatedEngine(family, measure_steps=measured) as engine:
        images_of(engine.begin())
        key = family.fingerprint, torch.float32
        wait_until(lambda: engine.is_measured(*key))
        wait_until(lambda: engine.costs == {key: costs_of(20)})
        assert next(found, None) is None
        images_of(engine.begin())
        time.sleep(0.3)
        assert engine.costs == {key: costs_of(20)}


def test_what_nobody_has_used_is_measured_when_that_is_asked_for(
    family: Family, measuring: Measuring
) -> None:
    measuring.may_end.set()
    with GatedEngine(family, measure_steps=measuring) as engine:
        engine.measure(family, DType.BFLOAT16)
        wait_until(lambda: measuring.thorough == 1)
        assert engine.costs == {}, "nobody steps it yet"
