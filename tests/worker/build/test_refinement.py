"""Models that are trained on after their Sigma."""

import dataclasses
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from learngenes.data.images import as_picture, encode_png
from learngenes.family.family import Family
from learngenes.measuring.model import Measurement
from learngenes.model.factors import DenseLayers, Own, Scales
from learngenes.model.sampling import sample
from learngenes.training.refine import Refined, RefinementConfig, refine
from learngenes.training.tuning import OnProgress, Progress
from registry.records import ModelRecord, Refinement
from registry.store import generation_name, image_file
from tests.support import builds
from tests.support.records import queued_model, revision_name
from tests.worker.build.test_build import enqueued, statuses
from tests.worker.conftest import MakeGeneration, MakeModel, build_housekeeping, told
from worker.artifacts import load_own
from worker.build.refinement import Pace
from worker.build.verify import Specimen
from worker.runtime import Runtime
from worker.sampling.sample import Sampling


@pytest.fixture
def refinable(runtime: Runtime) -> ModelRecord:
    """A queued model that is to be refined."""
    record = queued_model(device_class=runtime.device_class, mode="materialised")
    return runtime.repository.models.create(record.replace(refine=Refinement(max_seconds=600)))


def briefly(family: Family, own: Own, config: RefinementConfig, *rest: Any, **more: Any) -> Refined:
    """A refinement of 30 steps."""
    brief = config.model_copy(update={"steps": 30, "learning_rate": 1e-3})
    return refine(family, own, brief, *rest, **more)


def build(runtime: Runtime, model_id: str, **tools: Any) -> ModelRecord:
    return builds.build(runtime, model_id, **{"refine": briefly, **tools})


EVERY_STEP = Pace(least_pause_seconds=0, most_events=sys.maxsize)
"""Tells the progress of each."""


def refining_steps(runtime: Runtime, model_id: str) -> list[object]:
    progress = told(runtime, model_id, "progress")
    return [event["step"] for event in progress if event["status"] == "refining"]


def test_it_is_published_retrained_then_refined(runtime: Runtime, refinable: ModelRecord) -> None:
    record = build(runtime, refinable.id)
    assert (record.status, record.revision, record.plan.mode) == ("ready", 2, "materialised")
    order = ["queued", "assembling", "retraining", "verifying", "refining", "ready"]
    assert list(dict.fromkeys(statuses(runtime, record.id))) == order
    family = runtime.family("tiny")
    names = [revision_name(runtime.store, record.id, i) for i in range(3)]
    kinds = [type(load_own(runtime.store, family, name)) for name in names]
    assert kinds == [Scales, Scales, DenseLayers]
    (figures,) = told(runtime, record.id, "refined")
    assert figures["steps"] == 30
    assert figures["heldout_loss"] < figures["heldout_loss_before"]  # type: ignore[operator]
    phases = [event["status"] for event in told(runtime, record.id, "progress")]
    assert list(dict.fromkeys(phases)) == ["retraining", "refining"]
    folder = runtime.store.root / "models" / record.id
    assert {p.name for p in folder.iterdir()} == {"record", *(Path(n).name for n in names)}


def test_it_is_sampled_with_its_own_weights(
    runtime: Runtime, refinable: ModelRecord, make_generation: MakeGeneration, sampler: Sampling
) -> None:
    build(runtime, refinable.id)
    generation = make_generation(refinable.id)
    sampler.generate(generation.id)
    done = runtime.repository.generations.get(generation.id)
    assert (done.status, done.revision) == ("done", 2)
    family = runtime.family("tiny")
    own = load_own(runtime.store, family, revision_name(runtime.store, refinable.id, 2))
    plan = runtime.repository.models.get(refinable.id).plan
    alone = sample(
        family.assemble(own, plan.mode, plan.dtype),
        family.manifest.diffusion,
        generation.class_labels,
        generation.seeds,
        num_inference_steps=generation.num_inference_steps,
        guidance_scale=generation.guidance_scale,
    )
    for index, image in enumerate(alone.numpy()):
        stored = runtime.store.read(generation_name(generation.id), image_file(index))
        assert stored == encode_png(as_picture(image))


def test_a_refinement_that_gained_nothing_is_not_published(
    runtime: Runtime, refinable: ModelRecord
) -> None:
    def in_vain(*arguments: Any, **more: Any) -> Refined:
        refined = briefly(*arguments, **more)
        return dataclasses.replace(refined, heldout_loss=refined.initial_heldout_loss)

    record = build(runtime, refinable.id, refine=in_vain)
    assert (record.status, record.revision) == ("ready", 1)


def test_a_caller_can_say_that_it_is_enough(runtime: Runtime, refinable: ModelRecord) -> None:
    models = runtime.repository.models
    runtime.progress_seconds = 0

    def without_end(
        family: Family,
        scales: Scales,
        config: RefinementConfig,
        tell: OnProgress,
        *rest: Any,
        **more: Any,
    ) -> Refined:
        def stop(progress: Progress) -> None:
            if progress.step == 9:
                models.change(refinable.id, refine=Refinement(max_seconds=600, stopped=True))
            tell(progress)

        return briefly(family, scales, config, stop, *rest, **more)

    assert build(runtime, refinable.id, refine=without_end).status == "ready"
    assert told(runtime, refinable.id, "refined")[0]["steps"] == 9


def test_what_was_interrupted_too_often_is_served_as_it_was(
    runtime: Runtime, refinable: ModelRecord
) -> None:
    models = runtime.repository.models

    def away(*_: object, **__: object) -> None:
        raise redis.ConnectionError

    for _ in range(runtime.settings.max_attempts - 1):
        with pytest.raises(redis.ConnectionError):
            build(runtime, refinable.id, refine=away)
    assert models.get(refinable.id).status == "refining"
    record = build(runtime, refinable.id, refine=away)
    assert (record.status, record.revision) == ("ready", 1)
    assert told(runtime, refinable.id, "refined") == [{"error": "it was interrupted too often"}]


def test_it_gives_way_to_models_that_wait_and_goes_on_after_them(
    runtime: Runtime, refinable: ModelRecord, make_model: MakeModel, client: redis.Redis
) -> None:
    models, queue = runtime.repository.models, f"build.{runtime.device_class}"
    runtime.progress_seconds, at_once = 0, dataclasses.replace(EVERY_STEP, turn_seconds=0)
    other = make_model().id
    runtime.queue.enqueue("fineserve.build", other, runtime.device_class)
    halfway = build(runtime, refinable.id, pace=at_once)
    assert (halfway.status, halfway.revision, halfway.attempts) == ("refining", 1, 0)
    assert sorted(enqueued(client, queue)) == sorted([other, refinable.id])
    assert not models.leased(refinable.id)
    build_housekeeping(runtime).requeue_lost()
    assert enqueued(client, queue).count(refinable.id) == 1
    build(runtime, other)
    client.delete(queue)
    record = build(runtime, refinable.id, pace=at_once, retrain=None)  # it is not retrained again
    assert (record.status, record.revision, record.attempts) == ("ready", 2, 1)
    assert refining_steps(runtime, record.id) == [*range(1, 31)]


def test_it_goes_on_after_a_shutdown(runtime: Runtime, refinable: ModelRecord) -> None:
    models = runtime.repository.models
    runtime.progress_seconds, every_step = 0, {"pace": EVERY_STEP}
    thread = threading.Thread(target=build, args=(runtime, refinable.id), kwargs=every_step)
    thread.start()
    while thread.is_alive() and not refining_steps(runtime, refinable.id):
        pass
    runtime.stopping.set()
    thread.join(timeout=20)
    assert models.get(refinable.id).status == "refining"
    runtime.stopping.clear()
    steps_before = refining_steps(runtime, refinable.id)
    build(runtime, refinable.id, pace=EVERY_STEP)
    assert (models.get(refinable.id).status, models.get(refinable.id).attempts) == ("ready", 1)
    steps = refining_steps(runtime, refinable.id)[len(steps_before) :]
    # what the shutdown kept from being told was done
    assert steps[0] in (len(steps_before) + 1, len(steps_before) + 2)
    assert steps == [*range(int(str(steps[0])), 31)]


def test_whatever_goes_wrong_the_retrained_model_stays(
    runtime: Runtime, refinable: ModelRecord
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise MemoryError("no room for Adam")

    record = build(runtime, refinable.id, refine=no_room)
    assert (record.status, record.revision) == ("ready", 1)
    assert record.measured is not None
    assert told(runtime, refinable.id, "refined") == [{"error": "MemoryError: no room for Adam"}]


def test_a_refined_model_over_its_budget_is_not_published(
    runtime: Runtime, refinable: ModelRecord
) -> None:
    verified: list[type] = []

    def measure_more(specimen: Specimen, own: Own, on_wait: Callable[[], object]) -> Measurement:
        verified.append(type(own))
        measurement = builds.verify_here(specimen, own, on_wait)
        if not isinstance(own, DenseLayers):
            return measurement
        cost = dataclasses.replace(measurement.cost, memory_bytes=10**10)
        return dataclasses.replace(measurement, cost=cost)

    record = build(runtime, refinable.id, verify=measure_more)
    assert verified == [Scales, DenseLayers]
    assert (record.status, record.revision, record.over_budget) == ("ready", 1, [])
    assert record.measured is not None
    assert record.measured.memory_bytes < 10**10


def test_a_model_deleted_while_it_is_refined_leaves_nothing(
    runtime: Runtime, refinable: ModelRecord
) -> None:
    runtime.progress_seconds = 0

    def delete_and_refine(*arguments: Any, **more: Any) -> Refined:
        runtime.repository.models.change(refinable.id, status="deleted")
        return briefly(*arguments, **more)

    assert build(runtime, refinable.id, refine=delete_and_refine).status == "deleted"
    assert not (runtime.store.root / "models" / refinable.id).exists()
