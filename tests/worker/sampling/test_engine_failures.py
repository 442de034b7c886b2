"""What an engine does about what cannot be done."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from learngenes.config import DType, Mode
from learngenes.family.family import Family
from learngenes.measuring.steps import StepCosts
from learngenes.model.factors import Scales
from learngenes.stepping.batch import Part
from learngenes.stepping.kernels import Kernels
from tests.support.engines import (
    AMPLE,
    SECONDS,
    Gate,
    Model,
    alone,
    ask,
    images_of,
    made_up_costs,
    room_for,
    same,
)
from worker.sampling.engine import Engine
from worker.sampling.jobs import EngineStopped, NotFinite


class Lost(Exception):
    pass


def test_what_cannot_be_loaded_is_not_taken(engine: Engine, family: Family) -> None:
    def lost() -> Scales:
        raise Lost

    with pytest.raises(Lost):
        engine.submit(ask(family, load=lost))
    assert len(alone(engine, ask(family))) == 2


def test_what_is_gone_when_it_is_to_be_loaded_again_fails_alone(
    engine: Engine, gate: Gate, family: Family
) -> None:
    loads = [Model(1).scales(family)]

    def once() -> Scales:
        if not loads:
            raise Lost
        return loads.pop()

    alone(engine, ask(family, Model(1), load=once))
    gate.close()
    running = engine.submit(ask(family))
    gate.reached()
    gone = engine.submit(ask(family, Model(1), load=once))
    engine.residency.pool(family, DType.FLOAT32, 24).models.clear()
    gate.open()
    with pytest.raises(Lost):
        images_of(gone)
    assert same(images_of(running), alone(engine, running.request))


def test_it_knows_for_how_long_nothing_has_moved(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    job = engine.submit(ask(family))
    gate.reached()
    before = engine.watch.stuck_seconds()
    time.sleep(0.1)
    assert engine.watch.stuck_seconds() >= before + 0.1
    gate.open()
    images_of(job)
    deadline = time.monotonic() + SECONDS
    while engine.watch.stuck_seconds():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("mode", Mode)
def test_a_model_of_no_numbers_fails_and_its_neighbours_do_not(
    engine: Engine, gate: Gate, family: Family, mode: Mode
) -> None:
    def broken() -> Scales:
        scales = Model(1).scales(family)
        for parameter in scales.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        return scales

    gate.close()
    first = engine.submit(ask(family, Model(0, mode=mode)))
    gate.reached()
    bad = engine.submit(ask(family, Model(1, mode=mode), load=broken))
    last = engine.submit(ask(family, Model(2, mode=mode)))
    gate.open()
    with pytest.raises(NotFinite, match="not numbers"):
        images_of(bad)
    for job in (first, last):
        assert same(images_of(job), alone(engine, job.request))
    assert max(gate.sizes) > 2


@pytest.mark.parametrize(
    "changes", [{"scheduler": "heun"}, {"num_inference_steps": 0}, {"class_labels": [7, 99]}]
)
def test_a_request_that_makes_no_sense_fails_alone(
    engine: Engine, gate: Gate, family: Family, changes: dict[str, Any]
) -> None:
    gate.close()
    good = engine.submit(ask(family))
    gate.reached()
    bad = engine.submit(ask(family, Model(1), **changes))
    gate.open()
    assert bad.wait(SECONDS)
    assert bad.error is not None
    assert not isinstance(bad.error, EngineStopped)
    assert same(images_of(good), alone(engine, good.request))


def fail_steps(gate: Gate, fails: Callable[[Sequence[Part]], bool]) -> list[int]:
    """Rows of the batches that failed."""
    failed: list[int] = []

    def fail(parts: Sequence[Part]) -> None:
        if fails(parts):
            failed.append(sum(len(part.x) for part in parts))
            raise Lost

    gate.refuse_to_step = fail
    return failed


def test_a_request_whose_steps_fail_fails_alone(engine: Engine, gate: Gate, family: Family) -> None:
    failed = fail_steps(gate, lambda parts: any(p.model.depth == 3 for p in parts))
    gate.close()
    jobs = [engine.submit(ask(family, Model(0), num_inference_steps=10))]
    gate.reached()
    jobs += [
        engine.submit(ask(family, Model(i, depth), num_inference_steps=10))
        for i, depth in ((1, 3), (2, 4))
    ]
    gate.open()
    with pytest.raises(Lost):
        images_of(jobs[1])
    assert failed == [6, 2]
    for job in (jobs[0], jobs[2]):
        assert same(images_of(job), alone(engine, job.request))
    assert failed == [6, 2]


def test_batches_are_halved_when_only_large_ones_fail(
    engine: Engine, gate: Gate, family: Family
) -> None:
    failed = fail_steps(gate, lambda parts: sum(len(p.x) for p in parts) > 2)
    gate.close()
    jobs = [engine.submit(ask(family, Model(0), 1, num_inference_steps=10))]
    gate.reached()
    jobs += [engine.submit(ask(family, Model(i), 1, num_inference_steps=10)) for i in range(1, 6)]
    gate.open()
    images = [images_of(job) for job in jobs]
    assert failed == [6, 3]
    assert engine.residency.pool(family, DType.FLOAT32, 24).most_rows == 3
    assert all(
        same(ours, alone(engine, job.request)) for ours, job in zip(images, jobs, strict=True)
    )


@pytest.fixture
def only_single_parts(gate: Gate) -> None:
    """Two parts cannot be composed."""

    def fail(parts: Sequence[Part]) -> None:
        if len(parts) > 1:
            raise Lost

    gate.refuse_to_compose = fail


def test_a_batch_that_cannot_be_composed_is_made_smaller(
    engine: Engine, gate: Gate, family: Family, only_single_parts: None
) -> None:
    gate.close()
    jobs = [engine.submit(ask(family, Model(0)))]
    gate.reached()
    jobs += [engine.submit(ask(family, Model(i))) for i in range(1, 4)]
    gate.open()
    for job in jobs:
        assert same(images_of(job), alone(engine, job.request))


# Room


def test_requests_wait_until_there_is_room_for_their_models(
    engine: Engine, gate: Gate, family: Family
) -> None:
    """Room for one, and all are asked for at once."""
    images = {i: alone(engine, ask(family, Model(i, mode=Mode.FACTORED))) for i in range(5)}
    pool = engine.residency.pool(family, DType.FLOAT32, 24)
    one = next(iter(pool.models.values())).nbytes
    pool.models.clear()
    room_for(engine, int(1.5 * one))
    gate.close()
    jobs = {i: engine.submit(ask(family, Model(i, mode=Mode.FACTORED))) for i in range(5)}
    gate.open()
    assert all(same(images_of(job), images[i]) for i, job in jobs.items())
    assert len(pool.models) == 1


def test_a_model_that_never_fits_is_refused(engine: Engine, family: Family) -> None:
    room_for(engine, 100)
    with pytest.raises(Exception, match="no room"):
        alone(engine, ask(family))


def small_table(engine: Engine, family: Family, rows: int) -> None:
    table = engine.residency.pool(family, DType.FLOAT32, 24).modulations
    table.max_rows, table.rows = rows, table.rows[:rows]


def test_requests_wait_until_there_is_room_for_their_modulations(
    engine: Engine, gate: Gate, family: Family
) -> None:
    small_table(engine, family, 30)  # a guided image of three steps has 2 * 3 * 3
    requests = [ask(family, Model(i), 1) for i in range(5)]
    gate.close()
    jobs = [engine.submit(request) for request in requests]
    gate.open()
    for job in jobs:
        assert same(images_of(job), alone(engine, job.request))
    assert max(gate.sizes) == 1


def test_a_request_of_too_many_steps_fails_alone(
    engine: Engine, gate: Gate, family: Family
) -> None:
    small_table(engine, family, 100)
    gate.close()
    good = engine.submit(ask(family))
    gate.reached()
    bad = engine.submit(ask(family, Model(1), num_inference_steps=40))
    gate.open()
    with pytest.raises(ValueError, match="fewer num_inference_steps"):
        images_of(bad)
    assert len(images_of(good)) == 2


# Turns


def test_an_engine_that_cannot_begin_says_so(family: Family) -> None:
    def broken(*_: object) -> StepCosts:
        raise Lost

    engine = Engine([family], AMPLE, compile_kernels=False, measure_steps=broken)
    with pytest.raises(EngineStopped, match="did not start"):
        engine.start()
    with pytest.raises(EngineStopped):
        engine.submit(ask(family))


def test_without_a_compiler_it_runs_uncompiled(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncompilable(Kernels):
        def warm_up(self, shared: object) -> None:
            raise Lost("no C++ compiler")

    monkeypatch.setattr(Kernels, "compiled", lambda device: Uncompilable())
    engine = Engine([family], AMPLE, measure_steps=made_up_costs)
    engine.start()
    assert len(alone(engine, ask(family))) == 2
    engine.stop()


def test_a_batch_of_another_dtype_that_cannot_be_composed_does_not_end_the_engine(
    engine: Engine, gate: Gate, family: Family, only_single_parts: None
) -> None:
    gate.close()
    jobs = [engine.submit(ask(family, Model(0)))]
    gate.reached()
    jobs += [
        engine.submit(ask(family, Model(i, dtype=dtype)))
        for i in (1, 2)
        for dtype in (DType.FLOAT32, DType.BFLOAT16)
    ]
    gate.open()
    for job in jobs:
        assert len(images_of(job)) == 2


def test_an_engine_that_never_began_can_be_stopped(family: Family) -> None:
    engine = Engine([family], AMPLE, compile_kernels=False)
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.submit(ask(family))
