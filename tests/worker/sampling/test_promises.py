"""Elastic requests in the engine: chosen, refused, finished smaller."""

import time
from dataclasses import replace

import pytest

from learngenes.config import Size
from registry.errors import Refused
from tests.support.engines import SECONDS, GatedEngine, Model, alone, images_of, same
from worker.sampling.elastic import Choice, step_seconds
from worker.sampling.jobs import Elastic, Job, SampleRequest

STEPS = 9


def elastic(
    engine: GatedEngine, seconds: float, *, yields: bool = True, **asked: object
) -> Elastic:
    """A request for two images that may be of depth 4, 3 or 2."""
    choices = {}
    for depth in (4, 3, 2):
        request = engine.ask(Model(depth=depth), num_inference_steps=STEPS, **asked)
        sampling = request.sampling
        guide = sampling.guide.depth if sampling.guide else 0
        choices[Choice(depth / 4, depth, STEPS, sampling.guided, guide)] = request
    return Elastic(choices, time.monotonic() + seconds, yields, shrinks=True)


def request_of(asked: Elastic, depth: int) -> SampleRequest:
    return next(request for request in asked.choices.values() if request.depth == depth)


def in_danger(engine: GatedEngine, job: Job) -> None:
    """Let the rest of a job look as if it took twice as long as it may."""
    part, now = job.parts[0], time.monotonic()
    load = engine._promises.loads([part])[0]
    seconds = load.left * load.place.expected([(load.depth, load.rows)])
    job.deadline = now + 30
    kind = engine._expected[part.state.batch].kind  # type: ignore[union-attr,index]
    for _ in range(200):
        engine._promises.controller.learned.step(kind, seconds, 70)


def endangered(engine: GatedEngine, asked: Elastic) -> Job:
    """A request whose promise looked broken after its second step, and that has ended."""
    engine.gate.close()
    job = engine.submit_elastic(asked)
    engine.gate.reached()
    engine.gate.allow(2)
    in_danger(engine, job)
    engine.gate.open()
    assert job.wait(SECONDS)
    return job


def test_a_request_gets_the_best_size_that_is_there_in_time(engine: GatedEngine) -> None:
    asked = elastic(engine, SECONDS)
    job = engine.submit_elastic(asked)
    images = images_of(job)
    assert job.promise is not None
    assert (job.promise.choice.depth, job.promise.kept) == (4, True)
    assert job.request is request_of(asked, 4)
    assert same(images, alone(engine, job.request))
    assert job.finished_at is not None
    engine.delivered(job)


def test_what_cannot_be_there_is_refused_before_a_step(engine: GatedEngine) -> None:
    job = engine.submit_elastic(elastic(engine, 0.0001))
    assert job.wait(SECONDS)
    assert engine.gate.sizes == []
    with pytest.raises(Refused, match="even when nobody else is there") as refusal:
        job.images()
    assert refusal.value.retry_seconds is None


def test_what_comes_too_late_behind_others_is_told_when_to_come_back(engine: GatedEngine) -> None:
    ahead = elastic(engine, SECONDS)
    engine.gate.close()
    first = engine.submit_elastic(ahead)
    engine.gate.reached()
    in_danger(engine, first)  # its steps seem to take seconds
    second = engine.submit_elastic(elastic(engine, 20, owner="other"))
    third = engine.submit_elastic(elastic(engine, 20, yields=False))
    engine.gate.open()
    assert second.wait(SECONDS)
    with pytest.raises(Refused, match=r"even when nobody|retry in \d+ s"):
        second.images()
    assert images_of(third)
    assert third.promise is not None
    assert (third.promise.choice.depth, third.promise.kept) == (2, False)


@pytest.mark.parametrize("guided", [{}, {"guide": Size(depth=1, rank=8)}, {"guidance_scale": 1.0}])
def test_a_promise_that_would_be_broken_is_kept_by_a_smaller_size(
    engine: GatedEngine, guided: dict[str, object]
) -> None:
    def finished_smaller() -> Job:
        job = endangered(engine, elastic(engine, SECONDS, **guided))
        engine._promises.controller.learned._medians.clear()
        return job

    job, again = finished_smaller(), finished_smaller()
    assert job.shrunk is not None
    assert job.shrunk.depth < 4
    assert job.request.depth == job.shrunk.depth
    images = images_of(job)
    assert same(images, images_of(again))
    asked = elastic(engine, SECONDS, **guided)
    for depth in (4, job.shrunk.depth):
        assert not same(images, alone(engine, request_of(asked, depth)))


def test_what_would_rather_come_late_does_not_shrink(engine: GatedEngine) -> None:
    asked = replace(elastic(engine, SECONDS), shrinks=False)
    job = endangered(engine, asked)
    images = images_of(job)
    assert job.shrunk is None
    assert same(images, alone(engine, request_of(asked, 4)))


def test_others_among_elastic_requests_get_the_bytes_that_they_get_alone(
    engine: GatedEngine,
) -> None:
    plain = engine.ask(Model(seed=5, depth=3), num_inference_steps=STEPS)
    engine.gate.close()
    jobs = [engine.submit_elastic(elastic(engine, SECONDS)), engine.submit(plain)]
    engine.gate.open()
    for job in jobs:
        assert same(images_of(job), alone(engine, job.request))


def test_parts_of_one_place_are_stepped_together_in_a_forecast(engine: GatedEngine) -> None:
    engine.gate.close()
    jobs = [engine.submit_elastic(elastic(engine, SECONDS))]
    engine.gate.reached()
    jobs.append(engine.submit_elastic(elastic(engine, SECONDS)))
    engine.gate.allow(1)
    first, second = engine._promises.loads([job.parts[0] for job in jobs])
    assert first.place == second.place
    alone = step_seconds([first])
    assert alone < step_seconds([first, second]) < 2 * alone
    engine.gate.open()
    gauges = engine.elastic_gauges
    assert (gauges["elastic_rate"], gauges["elastic_depth"]) == (0.4, 4)
    assert all(job.wait(SECONDS) for job in jobs)
    assert engine.elastic_gauges["engine_slowdown_ratio"] > 0


def test_the_depth_is_gauged_while_requests_come(engine: GatedEngine) -> None:
    assert engine.elastic_gauges == {"elastic_rate": 0}
