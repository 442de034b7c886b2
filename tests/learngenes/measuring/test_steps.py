import time
from types import SimpleNamespace

import pytest

from learngenes.config import SHARED_MODES, DType, Mode
from learngenes.device import peak_bytes
from learngenes.family.family import Family
from learngenes.measuring import steps
from learngenes.measuring.steps import (
    StepCosts,
    measure_step_costs,
    median_of,
    seconds_a_step,
)
from learngenes.stepping.batch import Batch
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.weights import SharedWeights
from tests.support.batches import Desk, weights

COSTS = StepCosts(
    rows=(2, 4, 8),
    seconds=(0.3, 0.4, 0.8),
    full_rows=4,
    row_bytes=1000,
    factored_ratio={8: 0.5, 24: 0.9, 48: 1.5},
)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [(1, 0.3), (2, 0.3), (3, 0.35), (4, 0.4), (6, 0.6), (8, 0.8), (12, 1.2), (80, 8.0)],
)
def test_a_step_lasts_as_between_its_neighbours_and_beyond_in_proportion(
    rows: int, seconds: float
) -> None:
    assert COSTS.step_seconds(rows) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("rank", "factored"), [(1, True), (8, True), (24, True), (26, True), (30, False), (90, False)]
)
def test_a_rank_is_factored_where_that_is_faster(rank: int, factored: bool) -> None:
    assert COSTS.prefers_factored(rank) is factored


@pytest.fixture(params=[DType.FLOAT32, DType.BFLOAT16])
def shared(family: Family, request: pytest.FixtureRequest) -> SharedWeights:
    return SharedWeights(family, request.param)


@pytest.mark.parametrize(
    ("max_rows", "rows"), [(2, (2,)), (16, (2, 4, 8, 16)), (31, (2, 4, 8, 16))]
)
def test_rows_are_doubled_up_to_the_most(
    shared: SharedWeights, max_rows: int, rows: tuple[int, ...]
) -> None:
    costs = measure_step_costs(shared, Kernels(), max_rows, max_seconds=1000)
    assert costs.rows == rows
    assert len(costs.seconds) == len(rows)
    assert min(costs.seconds) > 0
    assert costs.full_rows in rows


def test_every_rank_is_compared(shared: SharedWeights) -> None:
    costs = measure_step_costs(shared, Kernels(), 4, max_seconds=1000)
    assert tuple(costs.factored_ratio) == shared.family.manifest.sizes.ranks
    assert min(costs.factored_ratio.values()) > 0


def test_without_time_the_least_is_measured_that_can_be_used(shared: SharedWeights) -> None:
    costs = measure_step_costs(shared, Kernels(), 64, max_seconds=0)
    assert (costs.rows, costs.full_rows) == ((2,), 2)
    ranks = shared.family.manifest.sizes.ranks
    assert tuple(costs.factored_ratio) == (ranks[0], ranks[-1])
    assert costs.row_bytes > 0


def test_steps_do_not_run_out_where_some_batches_are_much_faster(shared: SharedWeights) -> None:
    def as_if(batch: Batch, steps: int) -> float:
        seconds_a_step(batch, steps)
        return 100.0 ** len(batch.parts) * batch.parts[0].x.shape[0]

    costs = measure_step_costs(shared, Kernels(), 16, max_seconds=1000, seconds_of=as_if)
    assert costs.seconds == (200, 400, 800, 1600)
    assert set(costs.factored_ratio.values()) == {50}


@pytest.mark.parametrize("mode", SHARED_MODES)
def test_rows_take_about_what_is_said(shared: SharedWeights, mode: Mode) -> None:
    costs = measure_step_costs(shared, Kernels(), 16, max_seconds=1000)
    desk = Desk(shared)
    rows = 12
    model = weights(shared, shared.family.scales, mode)
    part = desk.part(model, [0] * rows, range(rows), guidance_scale=1.0)
    batch = desk.batch([part])
    held = peak_bytes(batch.step, shared.device)
    # as it is predicted for compiled kernels; those that are not hold up to twice as much
    assert 0.4 * held <= rows * costs.row_bytes <= 2 * held


def test_what_is_measured_leaves_the_family_as_it_was(family: Family) -> None:
    before = {name: tensor.clone() for name, tensor in family.genes.state_dict().items()}
    measure_step_costs(SharedWeights(family, DType.BFLOAT16), Kernels(), 4)
    after = family.genes.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def test_beside_other_processes_a_step_is_what_is_worked_at_it(
    shared: SharedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processors work for two seconds each at four steps, of which each takes ten."""
    worked = iter([100.0, 104.0])
    monkeypatch.setattr(steps.time, "process_time", lambda: next(worked))
    monkeypatch.setattr(steps, "seconds_a_step", lambda *_: 10.0)
    batch = SimpleNamespace(shared=shared)
    assert steps.worked_seconds_a_step(batch, 4, processors=2) == 0.5
    worked = iter([100.0, 200.0])
    assert steps.worked_seconds_a_step(batch, 4, processors=2) == 10.0


def test_the_median_of_measurements_is_taken_field_by_field() -> None:
    def measured(rows: tuple[int, ...], *seconds: float, ratio: float) -> StepCosts:
        return StepCosts(rows, seconds, rows[-1], 100, {8: ratio})

    found = [
        measured((2, 4), 0.3, 0.4, ratio=0.9),
        measured((2, 4), 0.1, 0.6, ratio=0.7),
        measured((2, 4), 0.2, 0.5, ratio=0.8),
    ]
    assert median_of(found) == measured((2, 4), 0.2, 0.5, ratio=0.8)
    assert median_of(found[:1]) == found[0]
    of_more_rows = measured((2, 4, 8), 0.2, 0.5, 0.9, ratio=0.8)
    assert median_of([*found, of_more_rows]) == of_more_rows


@pytest.mark.parametrize(("late", "most"), [(True, 1), (False, 1 + steps.ROUNDS)])
def test_a_step_that_outlasts_its_time_is_the_whole_measurement(late: bool, most: int) -> None:
    timed: list[int] = []

    def seconds_of(_: object, count: int) -> float:
        timed.append(count)
        return 0.001

    until = time.perf_counter() + (-1 if late else 60)
    taken = steps.step_seconds({"a": object()}, until, seconds_of)
    assert taken == {"a": 0.001}
    assert len(timed) == most
