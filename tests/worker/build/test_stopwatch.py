"""A model timed by real generations, which a real sampler makes."""

import threading
from collections.abc import Callable, Iterator

import pytest

from learngenes.sizing.budget import Workload
from registry.records import GenerationRecord, ModelRecord
from tests.support.builds import build
from tests.support.devices import beat
from tests.support.engines import Undisturbed
from tests.worker.conftest import MakeGeneration, MakeModel
from worker.build import stopwatch
from worker.build.stopwatch import (
    LEAST_RUNS,
    LONG_RUNS,
    MOST_RUNS,
    OWNER,
    WARMING_RUNS,
    Stopwatch,
)
from worker.runtime import Runtime
from worker.sampling.sample import Sampling

WORKLOAD = Workload.of(n=2, num_inference_steps=2)


@pytest.fixture
def model(runtime: Runtime, make_model: MakeModel) -> ModelRecord:
    return build(runtime, make_model().id)


@pytest.fixture
def sampler(sampler: Sampling) -> Sampling:
    sampler._quiet = Undisturbed(sampler.runtime.device)
    beat(sampler.runtime, id="a-sampler", queue="sample")
    return sampler


@pytest.fixture
def serving(runtime: Runtime, sampler: Sampling) -> Iterator[list[GenerationRecord]]:
    """A worker that makes what is asked for; what it made."""
    stop = threading.Event()
    made: list[GenerationRecord] = []

    def work() -> None:
        while not stop.wait(0.002):
            for generation in runtime.repository.generations.active():
                made.append(generation)  # first: who waits for it may look at once
                sampler.generate(generation.id)

    thread = threading.Thread(target=work)
    thread.start()
    yield made
    stop.set()
    thread.join()


def watch(runtime: Runtime, seconds: float = 600, tell: Callable[[], object] = int) -> Stopwatch:
    return Stopwatch(runtime, seconds, tell, idle_seconds=0.1)


def test_a_model_is_timed_by_what_its_callers_wait_for(
    runtime: Runtime, model: ModelRecord, serving: list[GenerationRecord]
) -> None:
    timing = watch(runtime).time(model, WORKLOAD)
    assert timing is not None
    assert 0 <= timing.overhead_seconds < timing.latency_seconds <= timing.latency_p95_seconds
    assert timing.disturbed == ""
    assert len(serving) == WARMING_RUNS + MOST_RUNS
    assert {(len(each.seeds), each.num_inference_steps) for each in serving} == {(2, 2)}
    assert {(each.owner, each.timed) for each in serving} == {(OWNER, True)}
    assert runtime.repository.images_made([model.id]) == {}, "nobody asked for these"


def test_it_takes_no_longer_than_it_may(
    runtime: Runtime, model: ModelRecord, serving: list[GenerationRecord]
) -> None:
    assert watch(runtime, seconds=0).time(model, WORKLOAD) is not None
    assert len(serving) == WARMING_RUNS + LEAST_RUNS


def test_a_model_whose_requests_take_long_is_timed_by_few(
    runtime: Runtime,
    model: ModelRecord,
    serving: list[GenerationRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopwatch, "LONG_SECONDS", 0.0)
    assert watch(runtime, seconds=0).time(model, WORKLOAD) is not None
    assert len(serving) == 1 + LONG_RUNS


@pytest.mark.usefixtures("serving")
def test_what_was_disturbed_throughout_is_said_to_be(
    runtime: Runtime, model: ModelRecord, sampler: Sampling
) -> None:
    sampler._quiet = Undisturbed(runtime.device, "other processes")
    timing = watch(runtime, seconds=0.1).time(model, WORKLOAD)
    assert timing is not None
    assert timing.disturbed == "other processes"
    assert timing.latency_seconds > 0


def test_other_requests_disturb(
    runtime: Runtime, model: ModelRecord, sampler: Sampling, make_generation: MakeGeneration
) -> None:
    def told(*, timed: bool) -> str | None:
        made = make_generation(model.id, timed=timed)
        sampler.generate(made.id)
        return runtime.repository.disturbance(made.id)

    assert told(timed=False) is None
    assert told(timed=True) == "1 generations of others"
    assert told(timed=True) == ""


@pytest.mark.usefixtures("serving")
def test_it_waits_for_a_device_that_is_busy_but_not_for_ever(
    runtime: Runtime, model: ModelRecord, make_generation: MakeGeneration
) -> None:
    asked: list[None] = []
    other = make_generation("m-" + "0" * 16)
    timing = watch(runtime, 0, lambda: asked.append(None)).time(model, WORKLOAD)
    assert timing is not None
    assert asked
    assert runtime.repository.generations.get(other.id).finished


def test_where_nobody_serves_nothing_is_timed(runtime: Runtime, model: ModelRecord) -> None:
    assert watch(runtime).time(model, WORKLOAD) is None
    beat(runtime, id="another", queue="sample", families=["another"])
    beat(runtime, id="elsewhere", queue="sample", device_class="a-gpu")
    assert watch(runtime).time(model, WORKLOAD) is None


def test_a_worker_that_is_gone_is_not_waited_for(
    runtime: Runtime, model: ModelRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "LONGEST_SECONDS", 0.1)
    beat(runtime, 0.05, id="a-sampler", queue="sample")
    assert watch(runtime).time(model, WORKLOAD) is None
    assert runtime.repository.generations.active() == []


@pytest.mark.usefixtures("serving")
def test_what_cannot_be_sampled_is_not_timed(runtime: Runtime, model: ModelRecord) -> None:
    runtime.repository.models.change(model.id, status="deleted")
    assert watch(runtime).time(model, WORKLOAD) is None


def test_who_does_not_say_counts_as_disturbed(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "TOLD_SECONDS", 0.02)
    assert watch(runtime)._disturbed("g-1") == "the worker that served it does not say"
