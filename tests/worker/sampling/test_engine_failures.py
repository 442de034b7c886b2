"""What an engine does about what cannot be done."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from learngenes.config import SHARED_MODES, DType, Mode
from learngenes.family.family import Family
from learngenes.measuring.steps import StepCosts
from learngenes.model.factors import Scales
from learngenes.stepping.batch import Part
from learngenes.stepping.kernels import Kernels
from tests.support.engines import (
    SECONDS,
    GatedEngine,
    Model,
    alone,
    images_of,
    made_up_costs,
    room_for,
    same,
    undisturbed,
)
from worker.sampling.jobs import EngineStopped, NotFinite


class Lost(Exception):
    pass


def test_what_cannot_be_loaded_is_not_taken(engine: GatedEngine) -> None:
    def lost() -> Scales:
        raise Lost

    with pytest.raises(Lost):
        engine.begin(load=lost)
    assert len(alone(engine, engine.ask())) == 2


def test_what_is_gone_when_it_is_to_be_loaded_again_fails_alone(engine: GatedEngine) -> None:
    loads = [Model(1).scales(engine.family)]

    def once() -> Scales:
        if not loads:
            raise Lost
        return loads.pop()

    alone(engine, engine.ask(Model(1), load=once))
    running, gone = engine.hold(engine.ask(), engine.ask(Model(1), load=once))
    engine.pool.models.clear()
    assert undisturbed(engine, running)
    with pytest.raises(Lost):
        images_of(gone)


def test_it_knows_for_how_long_nothing_has_moved(engine: GatedEngine) -> None:
    (job,) = engine.hold(engine.ask())
    before = engine.watch.stuck_seconds()
    time.sleep(0.1)
    assert engine.watch.stuck_seconds() >= before + 0.1
    engine.gate.open()
    images_of(job)
    deadline = time.monotonic() + SECONDS
    while engine.watch.stuck_seconds():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("mode", SHARED_MODES)
def test_a_model_of_no_numbers_fails_and_its_neighbours_do_not(
    engine: GatedEngine, mode: Mode
) -> None:
    def broken() -> Scales:
        scales = Model(1).scales(engine.family)
        for parameter in scales.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        return scales

    first, bad, last = engine.hold(
        engine.ask(Model(0, mode=mode)),
        engine.ask(Model(1, mode=mode), load=broken),
        engine.ask(Model(2, mode=mode)),
    )
    assert undisturbed(engine, first, last)
    with pytest.raises(NotFinite, match="not numbers"):
        images_of(bad)
    assert max(engine.gate.sizes) > 2


@pytest.mark.parametrize(
    "changes", [{"scheduler": "heun"}, {"num_inference_steps": 0}, {"class_labels": [7, 99]}]
)
def test_a_request_that_makes_no_sense_fails_alone(
    engine: GatedEngine, changes: dict[str, Any]
) -> None:
    good, bad = engine.hold(engine.ask(), engine.ask(Model(1), **changes))
    assert undisturbed(engine, good)
    assert bad.wait(SECONDS)
    assert bad.error is not None
    assert not isinstance(bad.error, EngineStopped)


def fail_steps(engine: GatedEngine, fails: Callable[[Sequence[Part]], bool]) -> list[int]:
    """Rows of the batches that failed."""
    failed: list[int] = []

    def fail(parts: Sequence[Part]) -> None:
        if fails(parts):
            failed.append(sum(len(part.x) for part in parts))
            raise Lost

    engine.gate.refuse_to_step = fail
    return failed


def test_a_request_whose_steps_fail_fails_alone(engine: GatedEngine) -> None:
    failed = fail_steps(engine, lambda parts: any(p.model.depth == 3 for p in parts))
    models = (Model(0), Model(1, 3), Model(2, 4))
    jobs = engine.hold(*(engine.ask(model, num_inference_steps=10) for model in models))
    engine.gate.open()
    with pytest.raises(Lost):
        images_of(jobs[1])
    assert failed == [6, 2]
    assert undisturbed(engine, jobs[0], jobs[2])
    assert failed == [6, 2]


def test_batches_are_halved_when_only_large_ones_fail(engine: GatedEngine) -> None:
    failed = fail_steps(engine, lambda parts: sum(len(p.x) for p in parts) > 2)
    jobs = engine.hold(*(engine.ask(Model(i), 1, num_inference_steps=10) for i in range(6)))
    assert undisturbed(engine, *jobs)
    assert failed == [6, 3]
    assert engine.pool.most_rows == 3


@pytest.fixture
def only_single_parts(engine: GatedEngine) -> None:
    """Two parts cannot be composed."""

    def fail(parts: Sequence[Part]) -> None:
        if len(parts) > 1:
            raise Lost

    engine.gate.refuse_to_compose = fail


def test_a_batch_that_cannot_be_composed_is_made_smaller(
    engine: GatedEngine, only_single_parts: None
) -> None:
    jobs = engine.hold(*(engine.ask(Model(i)) for i in range(4)))
    assert undisturbed(engine, *jobs)


# Room


def test_requests_wait_until_there_is_room_for_their_models(engine: GatedEngine) -> None:
    """Room for one, and all are asked for at once."""
    images = {i: alone(engine, engine.ask(Model(i, mode=Mode.FACTORED))) for i in range(5)}
    pool = engine.pool
    one = next(iter(pool.models.values())).nbytes
    pool.models.clear()
    room_for(engine, int(1.5 * one))
    engine.gate.close()
    jobs = {i: engine.begin(Model(i, mode=Mode.FACTORED)) for i in range(5)}
    engine.gate.open()
    assert all(same(images_of(job), images[i]) for i, job in jobs.items())
    assert len(pool.models) == 1


def test_a_model_that_never_fits_is_refused(engine: GatedEngine) -> None:
    room_for(engine, 100)
    with pytest.raises(Exception, match="no room"):
        alone(engine, engine.ask())


def small_table(engine: GatedEngine, rows: int) -> None:
    table = engine.pool.modulations
    table.max_rows, table.rows = rows, table.rows[:rows]


def test_requests_wait_until_there_is_room_for_their_modulations(engine: GatedEngine) -> None:
    small_table(engine, 30)  # a guided image of three steps has 2 * 3 * 3
    engine.gate.close()
    jobs = [engine.begin(Model(i), 1) for i in range(5)]
    assert undisturbed(engine, *jobs)
    assert max(engine.gate.sizes) == 1


def test_a_request_of_too_many_steps_fails_alone(engine: GatedEngine) -> None:
    small_table(engine, 100)
    good, bad = engine.hold(engine.ask(), engine.ask(Model(1), num_inference_steps=40))
    engine.gate.open()
    with pytest.raises(ValueError, match="fewer num_inference_steps"):
        images_of(bad)
    assert len(images_of(good)) == 2


def test_a_request_whose_steps_cannot_be_measured_fails_alone(family: Family) -> None:
    outcomes: Iterator[StepCosts | Lost] = iter([Lost(), made_up_costs()])

    def measured(*_: object, **__: object) -> StepCosts:
        if isinstance(outcome := next(outcomes), Lost):
            raise outcome
        return outcome

    with GatedEngine(family, measure_steps=measured) as engine:
        with pytest.raises(Lost):
            images_of(engine.begin())
        assert len(images_of(engine.begin())) == 2


def test_other_kernels_whose_steps_cannot_be_measured_do_not_end_the_engine(
    family: Family,
) -> None:
    outcomes: Iterator[StepCosts | Lost] = iter([made_up_costs(), Lost()])

    def measured(*_: object, **__: object) -> StepCosts:
        if isinstance(outcome := next(outcomes), Lost):
            raise outcome
        return outcome

    with GatedEngine(family, measure_steps=measured) as engine:
        images_of(engine.begin())
        engine.use(family, torch.float32, Kernels(lanes=engine.lanes))
        assert len(images_of(engine.begin())) == 2
        assert list(engine.costs.values()) == [made_up_costs()]
        assert next(outcomes, None) is None


def test_a_batch_of_another_dtype_that_cannot_be_composed_does_not_end_the_engine(
    engine: GatedEngine, only_single_parts: None
) -> None:
    dtypes = (DType.FLOAT32, DType.BFLOAT16)
    models = [Model(0), *(Model(i, dtype=dtype) for i in (1, 2) for dtype in dtypes)]
    jobs = engine.hold(*map(engine.ask, models))
    engine.gate.open()
    for job in jobs:
        assert len(images_of(job)) == 2


def test_an_engine_that_never_began_can_be_stopped(family: Family) -> None:
    engine = GatedEngine(family)
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.begin()


def test_an_engine_whose_device_is_lost_ends(
    engine: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: object) -> None:
        raise Lost

    monkeypatch.setattr("worker.sampling.engine.require_usable", lost)
    engine.gate.refuse_to_step = lost
    with pytest.raises(Lost):
        images_of(engine.submit(engine.ask()))
    engine.gate.refuse_to_step = lambda _: None
    engine._thread.join(SECONDS)
    with pytest.raises(EngineStopped):
        engine.submit(engine.ask())
