import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from learngenes.config import DType, Mode, Scheduler
from learngenes.family.family import Family
from learngenes.measuring.steps import StepCosts
from learngenes.model.factors import Scales
from tests.support.engines import (
    AMPLE,
    FULL_ROWS,
    SECONDS,
    Gate,
    Model,
    alone,
    ask,
    images_of,
    random_model,
    reference,
    room_for,
    same,
)
from worker.sampling.engine import Engine
from worker.sampling.jobs import EngineStopped


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_come_and_go_together_get_the_images_they_get_alone(
    engine: Engine, gate: Gate, family: Family, seed: int
) -> None:
    generator = random.Random(seed)
    models = [random_model(generator) for _ in range(7)]
    requests = [
        ask(
            family,
            generator.choice(models),
            images=(images := generator.randint(1, 4)),
            class_labels=[generator.randrange(5) for _ in range(images)],
            seeds=[generator.randrange(10_000) for _ in range(images)],
            num_inference_steps=generator.randint(1, 12) if i else 100,
            guidance_scale=generator.choice([1.0, 1.5, 4.0]),
            scheduler=generator.choice([*Scheduler]),
            owner=generator.choice("ab"),
            target_seconds=generator.choice([0.01, 1.0, None]),
        )
        for i in range(20)
    ]
    gate.close()
    jobs, cancelled = [], set()
    for i, request in enumerate(requests):
        jobs.append(engine.submit(request))
        if i == 0:
            gate.reached()
        elif generator.random() < 0.5:
            gate.allow(generator.randint(1, 4))
        if i and generator.random() < 0.25:
            chosen = generator.choice(jobs[1:])
            cancelled.add(chosen)
            engine.cancel(chosen)
    gate.open()
    finished = []
    for request, job in zip(requests, jobs, strict=True):
        assert job.wait(SECONDS)
        if job in cancelled and isinstance(job.error, EngineStopped):
            continue
        finished.append((request, job.images()))
    assert len(finished) >= 10
    assert max(gate.sizes) > 4  # they did run together
    wrong = [request for request, images in finished if not same(alone(engine, request), images)]
    assert wrong == []


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("scheduler", Scheduler)
def test_images_are_those_of_the_models_own_network(
    engine: Engine, family: Family, mode: Mode, scheduler: Scheduler
) -> None:
    model = Model(mode=mode)
    request = ask(family, model, 3, scheduler=scheduler)
    difference = np.stack(alone(engine, request)) - reference(family, model, request)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_more_images_than_fit_in_a_batch_come_whole_and_in_order(
    engine: Engine, gate: Gate, family: Family, guidance_scale: float
) -> None:
    request = ask(family, images=20, guidance_scale=guidance_scale)
    images = alone(engine, request)
    per_batch = FULL_ROWS // request.rows_per_image
    assert max(gate.sizes) == per_batch
    single = [
        alone(
            engine,
            ask(family, class_labels=[label], seeds=[seed], guidance_scale=guidance_scale),
        )
        for label, seed in zip(request.class_labels, request.seeds, strict=True)
    ]
    assert same(images, [image for (image,) in single])


def test_one_image_may_be_larger_than_a_batch(family: Family) -> None:
    costs = StepCosts((1,), (0.001,), 1, 1, {48: 2.0})
    engine = Engine([family], AMPLE, compile_kernels=False, measure_steps=lambda *_: costs)
    engine.start()
    assert len(alone(engine, ask(family, images=3))) == 3
    engine.stop()


def test_hundreds_of_models_share_a_device_that_has_room_for_some(
    engine: Engine, gate: Gate, family: Family
) -> None:
    generator = random.Random(0)
    models = [
        Model(seed, generator.choice((2, 3, 4)), generator.choice((8, 24, 48)), mode)
        for seed, mode in ((seed, generator.choice(list(Mode))) for seed in range(300))
    ]
    room_for(engine, 2_000_000)  # their Sigma are 2 MB, their W 22
    asked = generator.sample(models, 300) + generator.choices(models, k=60)
    requests = [
        ask(family, model, 1, num_inference_steps=2, guidance_scale=1.0, seeds=[i])
        for i, model in enumerate(asked)
    ]
    gate.close()
    jobs = [engine.submit(request) for request in requests]
    gate.open()
    images = [images_of(job) for job in jobs]
    worst = max(
        np.abs(ours[0] - reference(family, model, request)[0]).max()
        for model, request, ours in zip(asked, requests, images, strict=True)
    )
    assert worst <= 1
    assert len([m for m in models if engine.residency.knows((str(m), 0))]) < 290


# Coming and going


def test_a_short_request_that_comes_during_a_long_one_is_done_first(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    long = engine.submit(ask(family, num_inference_steps=100))
    gate.reached()
    short = engine.submit(ask(family, Model(1)))
    gate.allow(6)
    assert short.wait(SECONDS)
    assert not long.done
    assert 3 <= long.progress[0] <= 7
    gate.open()
    assert same(images_of(long), alone(engine, long.request))
    assert same(images_of(short), alone(engine, short.request))


def test_a_cancelled_request_leaves_the_others_as_they_are(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    jobs = [engine.submit(ask(family, Model(i), num_inference_steps=8)) for i in range(3)]
    gate.reached()
    gate.allow(3)
    engine.cancel(jobs[1])
    gate.allow(2)
    assert jobs[1].done
    with pytest.raises(EngineStopped, match="cancelled"):
        jobs[1].images()
    gate.open()
    for job in (jobs[0], jobs[2]):
        assert same(images_of(job), alone(engine, job.request))


def test_a_request_can_be_cancelled_before_it_has_begun(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    first = engine.submit(ask(family, images=6))
    gate.reached()
    second = engine.submit(ask(family, Model(1), images=6))
    engine.cancel(second)
    gate.open()
    with pytest.raises(EngineStopped):
        images_of(second)
    assert len(images_of(first)) == 6


def test_cancelling_what_is_done_changes_nothing(engine: Engine, family: Family) -> None:
    job = engine.submit(ask(family))
    images = images_of(job)
    engine.cancel(job)
    alone(engine, ask(family, Model(1)))
    assert job.error is None
    assert same(job.images(), images)


def test_a_cancelled_request_of_several_batches_ends_as_a_whole(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    job = engine.submit(ask(family, images=20))
    gate.reached()
    gate.allow(4)  # one batch of three steps, and some of the next
    engine.cancel(job)
    gate.open()
    with pytest.raises(EngineStopped):
        images_of(job)
    assert len(alone(engine, ask(family, Model(1)))) == 2


def test_progress_counts_steps(engine: Engine, gate: Gate, family: Family) -> None:
    gate.close()
    job = engine.submit(ask(family, num_inference_steps=9))
    gate.reached()
    assert job.progress == (0, 9)
    gate.allow(4)
    assert job.progress == (4, 9)


def test_a_model_is_loaded_once(engine: Engine, family: Family) -> None:
    loads = []

    def load() -> Scales:
        loads.append(threading.current_thread())
        return Model().scales(family)

    for _ in range(3):
        alone(engine, ask(family, load=load))
    assert loads == [threading.current_thread()]
    alone(engine, ask(family, load=load, artifact="revision-1"))
    assert len(loads) == 2


def test_the_end_of_the_engine_is_the_end_of_its_requests(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    jobs = [engine.submit(ask(family, Model(i), 6, num_inference_steps=50)) for i in range(4)]
    gate.reached()
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(engine.stop)
        gate.open()
        stopped.result(SECONDS)
    for job in jobs:
        with pytest.raises(EngineStopped, match="stopped"):
            images_of(job)
    with pytest.raises(EngineStopped, match="not running"):
        engine.submit(ask(family))


def test_requests_may_come_from_many_threads(engine: Engine, family: Family) -> None:
    requests = [ask(family, Model(i % 4), 1, seeds=[i]) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda request: alone(engine, request), requests))
    assert all(
        same(ours, alone(engine, request)) for ours, request in zip(images, requests, strict=True)
    )


# Previews


def test_a_preview_is_what_an_image_is_taken_to_be(engine: Engine, family: Family) -> None:
    job = engine.submit(ask(family, num_inference_steps=250))
    while (preview := engine.preview(job, SECONDS)) is None:
        assert not job.done
    assert preview.shape == (3, 8, 8)
    assert preview.dtype == np.uint8
    while not job.done:
        engine.preview(job, SECONDS)
    assert same(images_of(job), alone(engine, job.request))


def test_there_is_no_preview_before_the_first_step_or_after_the_last(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    first = engine.submit(ask(family, images=6))
    gate.reached()
    waiting = engine.submit(ask(family, Model(1), images=6))
    assert engine.preview(waiting, 0.01) is None
    gate.open()
    images_of(first)
    images_of(waiting)
    assert engine.preview(waiting, SECONDS) is None


# What fails


def test_an_owner_of_one_request_does_not_wait_for_anothers_many(
    engine: Engine, gate: Gate, family: Family
) -> None:
    """Each request is a full batch of 16 steps."""
    gate.close()
    many = [
        engine.submit(ask(family, Model(i), 6, num_inference_steps=16, owner="many"))
        for i in range(8)
    ]
    gate.reached()
    one = engine.submit(ask(family, Model(9), 6, num_inference_steps=16, owner="one"))
    gate.allow(48)
    assert one.done
    assert sum(job.done for job in many) <= 3
    gate.open()
    assert all(len(images_of(job)) == 6 for job in many)


def test_of_one_owner_the_request_that_is_due_first_is_first(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    late = engine.submit(ask(family, Model(0), 6, num_inference_steps=40))
    gate.reached()
    early = engine.submit(ask(family, Model(1), 6, num_inference_steps=8, target_seconds=5))
    gate.allow(10)
    assert early.done
    assert not late.done
    gate.open()
    assert len(images_of(late)) == 6


@pytest.mark.parametrize(("target_seconds", "images"), [(None, 8), (24.0, 4), (12.0, 2)])
def test_a_full_batch_is_late_for_nobody_but_those_with_a_target(
    family: Family,
    gate: Gate,
    target_seconds: float | None,
    images: int,
) -> None:
    costs = StepCosts((4, 16), (1.0, 20.0), 16, 1, {48: 2.0})  # three steps of 8 rows: 22 s
    engine = Engine(
        [family],
        AMPLE,
        compile_kernels=False,
        measure_steps=lambda *_: costs,
        compose=gate.compose,
    )
    engine.start()
    gate.close()
    requests = [ask(family, Model(seed), target_seconds=target_seconds) for seed in range(4)]
    jobs = [engine.submit(requests[0])]
    gate.reached()
    jobs += [engine.submit(request) for request in requests[1:]]
    gate.allow(2)
    assert gate.sizes[-1] == images
    gate.open()
    assert all(len(images_of(job)) == 2 for job in jobs)
    engine.stop()


# Beginning


def test_what_a_step_costs_is_measured_for_every_dtype_before_it_is_ready(family: Family) -> None:
    engine = Engine([family], AMPLE, max_rows=4, compile_kernels=False)
    engine.start()
    assert {key[0] for key in engine.costs} == {family.fingerprint}
    assert torch.float32 in {key[1] for key in engine.costs}
    assert all(costs.rows[-1] <= 4 for costs in engine.costs.values())
    assert len(alone(engine, ask(family, Model(dtype=DType.BFLOAT16)))) == 2
    engine.stop()


def test_progress_ends_at_its_end(engine: Engine, gate: Gate, family: Family) -> None:
    gate.close()
    job = engine.submit(ask(family, images=20))
    gate.reached()
    seen = [job.progress]
    for _ in range(11):
        gate.allow(1)
        seen.append(job.progress)
    gate.open()
    images_of(job)
    seen.append(job.progress)
    assert seen == sorted(seen)
    assert seen[-1] == (12, 12)


def test_models_that_ran_together_leave_room_for_others(
    engine: Engine, gate: Gate, family: Family
) -> None:
    for i in range(12):
        alone(engine, ask(family, Model(i, 4), 1))
    pool = engine.residency.pool(family, DType.FLOAT32, 24)
    model = next(iter(pool.models.values()))
    own, w = model.nbytes, model.materialised_nbytes
    pool.models.clear()
    room_for(engine, 12 * own + 13 * w)
    gate.close()
    jobs = [engine.submit(ask(family, Model(i, 4), 1, guidance_scale=1.0)) for i in range(12)]
    gate.reached()
    gate.open()
    for job in jobs:
        images_of(job)
    assert len(alone(engine, ask(family, Model(99), 1))) == 1
    assert engine.residency.nbytes <= engine.residency.budget_bytes


def test_an_idle_engine_says_so(engine: Engine, family: Family) -> None:
    assert engine.submit(ask(family)).wait(SECONDS)
    ends = time.monotonic() + SECONDS
    while engine.gauges["engine_running"] and time.monotonic() < ends:
        time.sleep(0.001)
    assert engine.gauges["engine_running"] == engine.gauges["engine_waiting"] == 0
