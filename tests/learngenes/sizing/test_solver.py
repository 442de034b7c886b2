"""The solver against brute force: plain loops over every candidate, written independently."""

import itertools
import math
import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from learngenes.config import DType, Mode, SizeSpace
from learngenes.sizing.budget import Budget, Constraints, Plan, Workload
from learngenes.sizing.cost import making_bytes, memory_bytes, shared_bytes, weight_bytes
from learngenes.sizing.profile import DeviceProfile, LayerCost
from learngenes.sizing.quality import QualityTable
from learngenes.sizing.solver import Candidates, Impossible, Infeasible, Solution, solve
from tests.support.sizing import EXECUTIONS, NETWORK, ROWS, SIZES, device_profile, quality_table

CASES = 300
FIELDS = {
    "max_mem_gb": "max_mem_bytes",
    "max_latency_ms": "max_latency_seconds",
    "min_quality": "min_quality",
}
RELATIVE_BUDGETS = (0.3, 0.9, 1.0, 1.1, 2.0)
"""Some just enough for one candidate."""


class Case(NamedTuple):
    """One family on one device, and what is asked of them."""

    plans: list[Plan]
    """Of every size in storage whose loss is known."""
    candidates: Candidates
    constraints: Constraints

    @property
    def allowed(self) -> list[Plan]:
        return [plan for plan in self.plans if is_allowed(plan, self.constraints)]

    @property
    def feasible(self) -> list[Plan]:
        return [plan for plan in self.allowed if not missed(plan, self.constraints)]


def is_allowed(plan: Plan, constraints: Constraints) -> bool:
    return all(
        getattr(constraints, name) in (None, getattr(plan, name))
        for name in ("depth", "rank", "mode", "dtype")
    )


def memory(plan: Plan, constraints: Constraints) -> int:
    if constraints.mem_scope == "process":
        return plan.predicted.process_memory_bytes
    return plan.predicted.memory_bytes


def missed(plan: Plan, constraints: Constraints) -> set[str]:
    """The budgets that a plan does not keep."""
    mem, latency = constraints.max_mem_bytes, constraints.max_latency_seconds
    needed = plan.predicted.percentile_seconds(constraints.latency_percentile)
    misses = {
        "max_mem_gb": mem is not None and memory(plan, constraints) > mem,
        "max_latency_ms": latency is not None and needed > latency,
        "min_quality": plan.quality < (constraints.min_quality or 0),
    }
    return {name for name, is_missed in misses.items() if is_missed}


def only_ones(misses: list[set[str]]) -> set[str]:
    return {name for names in misses for name in names if names == {name}}


def stated(constraints: Constraints) -> set[str]:
    return {name for name, field in FIELDS.items() if getattr(constraints, field) is not None}


def merged(constraints: Constraints, budget: dict[str, float]) -> Constraints:
    """What a caller sends who takes the budget that was offered."""
    offered = Budget.model_validate(budget).constraints
    return constraints.model_copy(
        update={FIELDS[name]: getattr(offered, FIELDS[name]) for name in budget}
    )


Figures = tuple[float, float, float]


def figures(plan: Plan, constraints: Constraints) -> Figures:
    """The less, the better."""
    return -plan.quality, memory(plan, constraints), plan.predicted.latency_p95_seconds


def dominates(a: Figures, b: Figures) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def draw(rng: random.Random) -> Case:
    """Few different values, so that ties are common."""
    sizes = SizeSpace(
        depths=tuple(sorted(rng.sample(range(1, 9), rng.randint(1, 5)))),
        ranks=tuple(sorted(rng.sample(range(4, 49, 4), rng.randint(1, 5)))),
    )
    table, profile = draw_table(rng), draw_profile(rng, sizes)
    candidates = Candidates.of(NETWORK, sizes, table, profile, draw_workload(rng))
    plans = candidates.plans([*range(len(candidates.depth))])
    plans = [plan for plan in plans if table.loss_ratio(plan.mode, plan.dtype) < math.inf]
    return Case(plans, candidates, draw_constraints(rng, plans) if plans else Constraints())


def draw_table(rng: random.Random) -> QualityTable:
    grid = SizeSpace(depths=(2, 5), ranks=(8, 16, 48))
    losses = [[rng.choice((0.1, 0.13, 0.2, 0.37)) for _ in grid.ranks] for _ in grid.depths]
    ratios = {dtype: rng.choice((1.0, 1.017, 1.3)) for dtype in DType}
    for dtype in (DType.BFLOAT16, DType.INT8):
        if rng.random() < 0.2:
            del ratios[dtype]
    written = {dtype: ratio for dtype, ratio in ratios.items() if rng.random() < 0.8}
    return quality_table(
        grid,
        retrained=tuple(map(tuple, losses)),
        dtype_loss_ratios=ratios,
        materialised_loss_ratios=written,
    )


def draw_profile(rng: random.Random, sizes: SizeSpace) -> DeviceProfile:
    def seconds() -> float:
        return rng.choice((0.0011, 0.0023, 0.0037))

    layers = [
        LayerCost(
            mode=mode,
            dtype=dtype,
            rows=ROWS,
            ranks=sizes.ranks if mode is Mode.FACTORED else (1,),
            step_seconds=tuple(seconds() for _ in ROWS),
            seconds=tuple(
                tuple(seconds() for _ in ROWS)
                for _ in (sizes.ranks if mode is Mode.FACTORED else "W")
            ),
        )
        for mode, dtype in rng.sample(EXECUTIONS, rng.randint(1, len(EXECUTIONS)))
    ]
    return device_profile(
        NETWORK,
        sizes,
        layers=tuple(layers),
        native_bfloat16=rng.random() < 0.5,
        packing_threads=rng.choice((0, 2)),
        memory_overhead_bytes=rng.choice((0, 5000)),
        process_base_bytes=rng.choice((100_000, 10_000_000)),
        p95_ratio=1.2345,
    )


def draw_workload(rng: random.Random) -> Workload:
    return Workload.of(
        rng.choice((1, 4, 20)),
        num_inference_steps=rng.choice((1, 25)),
        guidance_scale=rng.choice((1, 2)),
    )


def draw_constraints(rng: random.Random, plans: list[Plan]) -> Constraints:
    """Each budget near what some plan needs; what is fixed is of one plan."""
    fixed = rng.choice(plans)
    values: dict[str, object] = {
        name: getattr(fixed, name)
        for name in ("depth", "rank", "mode", "dtype")
        if rng.random() < 0.15
    }
    scope = Constraints(mem_scope=rng.choice(("model", "process")))

    def near(value: float) -> float:
        return value * rng.choice(RELATIVE_BUDGETS)

    if rng.random() < 0.6:
        values["max_mem_bytes"] = int(near(memory(rng.choice(plans), scope)))
    if rng.random() < 0.6:
        of = values["latency_percentile"] = rng.choice((50, 95))
        values["max_latency_seconds"] = near(rng.choice(plans).predicted.percentile_seconds(of))
    if rng.random() < 0.5:
        values["min_quality"] = min(1.0, near(rng.choice(plans).quality))
    return Constraints.model_validate({**scope.model_dump(), **values})


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(CASES)]
    return [case for case in drawn if case.plans]


Solved = list[tuple[Case, Solution]]
Refused = list[tuple[Case, Infeasible]]


@pytest.fixture(scope="module")
def solved(cases: list[Case]) -> Solved:
    return [(case, solve(case.candidates, case.constraints)) for case in cases if case.feasible]


@pytest.fixture(scope="module")
def refused(cases: list[Case]) -> Refused:
    refusals = []
    for case in cases:
        if not case.feasible:
            with pytest.raises(Infeasible) as error:
                solve(case.candidates, case.constraints)
            refusals.append((case, error.value))
    return refusals


def candidates_of(
    table: QualityTable | None = None, workload: Workload | None = None, **profile: object
) -> Candidates:
    device = device_profile(NETWORK, SIZES, **profile)
    return Candidates.of(
        NETWORK, SIZES, table or quality_table(SIZES), device, workload or Workload()
    )


@pytest.fixture
def candidates() -> Candidates:
    return candidates_of()


def test_the_cases_are_of_every_sort(solved: Solved, refused: Refused) -> None:
    assert len(solved) > 150
    assert len(refused) > 50
    assert len({solution.binding for _, solution in solved}) == 4
    assert len({error.binding for _, error in refused}) > 4


def test_every_size_is_a_candidate_in_every_execution() -> None:
    table, workload = quality_table(SIZES), Workload.of(n=2, num_inference_steps=7)
    candidates = candidates_of(table, workload, memory_overhead_bytes=123)
    profile = device_profile(NETWORK, SIZES)
    plans = candidates.plans([*range(len(candidates.depth))])
    sizes = itertools.product(profile.executions, SIZES.depths, SIZES.ranks)
    for plan, (execution, depth, rank) in zip(plans, sizes, strict=True):
        bytes_ = memory_bytes(NETWORK, depth, rank, execution, workload) + 123
        shared = shared_bytes(NETWORK, rank, execution)
        seconds = float(profile.latency_seconds(depth, rank, execution, workload))
        ratio = table.loss_ratio(execution.mode, execution.dtype)
        assert (plan.depth, plan.rank, plan.n) == (depth, rank, 2)
        assert (plan.mode, plan.dtype) == (execution.mode, execution.dtype)
        assert plan.predicted.memory_bytes == bytes_
        own = weight_bytes(NETWORK, depth, rank, execution) + 123
        held = max(bytes_, own + making_bytes(NETWORK, rank, execution))
        process = held + held // 20 + 200_000_000 - shared
        assert plan.predicted.process_memory_bytes == process
        assert plan.predicted.latency_seconds == pytest.approx(seconds)
        assert plan.predicted.latency_p95_seconds == pytest.approx(1.2 * seconds)
        assert plan.quality == pytest.approx((1 / 4 + 10 / 48) / (1 / depth + 10 / rank) / ratio)


def test_the_best_is_chosen_of_equals_the_quickest_and_of_those_the_smallest(
    solved: Solved,
) -> None:
    def order(plan: Plan) -> tuple[float, float, int]:
        return -plan.quality, plan.predicted.latency_seconds, memory(plan, case.constraints)

    for case, solution in solved:
        assert order(solution.plan) == min(map(order, case.feasible))


def test_the_plan_keeps_what_was_asked_and_is_on_its_front(solved: Solved) -> None:
    for case, solution in solved:
        assert is_allowed(solution.plan, case.constraints)
        assert not missed(solution.plan, case.constraints)
        assert solution.plan in solution.front


def test_slack_is_what_is_left(solved: Solved) -> None:
    for case, solution in solved:
        constraints, slack = case.constraints, solution.slack
        assert (slack.memory_bytes is None) == (constraints.max_mem_bytes is None)
        assert (slack.latency_seconds is None) == (constraints.max_latency_seconds is None)
        if constraints.max_mem_bytes is not None:
            left = constraints.max_mem_bytes - memory(solution.plan, constraints)
            assert slack.memory_bytes == left >= 0
        if constraints.max_latency_seconds is not None:
            needed = solution.plan.predicted.percentile_seconds(constraints.latency_percentile)
            assert slack.latency_seconds == constraints.max_latency_seconds - needed >= 0


def test_a_budget_binds_when_without_it_there_were_a_better_plan(solved: Solved) -> None:
    for case, solution in solved:
        better = [plan for plan in case.allowed if plan.quality > solution.plan.quality]
        misses = [missed(plan, case.constraints) for plan in better]
        alone = only_ones(misses)
        if alone or not better:
            assert set(solution.binding) == alone
        else:
            assert set(solution.binding) == {"max_mem_gb", "max_latency_ms"}


def test_the_front_is_what_nothing_dominates(solved: Solved) -> None:
    for case, solution in solved:
        every = {figures(plan, case.constraints) for plan in case.allowed}
        undominated = {a for a in every if not any(dominates(b, a) for b in every)}
        front = [figures(plan, case.constraints) for plan in solution.front]
        assert set(front) == undominated
        assert len(front) == len(undominated)
        assert front == sorted(front, key=lambda values: values[0])
        assert all(plan in case.allowed for plan in solution.front)


def test_storage_that_the_quality_table_does_not_know_is_never_chosen(
    solved: Solved, refused: Refused
) -> None:
    assert any(len(case.plans) < len(case.candidates.depth) for case, _ in (*solved, *refused))
    assert all(solution.plan in case.plans for case, solution in solved)
    assert all(error.nearest in case.plans for case, error in refused)


def test_one_budget_is_named_where_relaxing_one_is_enough(refused: Refused) -> None:
    for case, error in refused:
        misses = [missed(plan, case.constraints) for plan in case.allowed]
        enough = only_ones(misses)
        if enough:
            assert len(error.binding) == 1
            assert set(error.binding) <= enough
        else:
            assert len(error.binding) > 1
            assert set(error.binding) <= stated(case.constraints)


def test_the_budgets_that_are_named_are_those_that_the_nearest_plan_misses(
    refused: Refused,
) -> None:
    for case, error in refused:
        assert is_allowed(error.nearest, case.constraints)
        assert missed(error.nearest, case.constraints) == set(error.binding)
        assert set(error.budget) == set(error.binding)


def test_the_nearest_plan_exceeds_its_one_budget_least(refused: Refused) -> None:
    for case, error in refused:
        if len(error.binding) == 1:
            place = ("min_quality", "max_mem_gb", "max_latency_ms").index(error.binding[0])
            others = [p for p in case.allowed if missed(p, case.constraints) == {*error.binding}]
            least = min(figures(plan, case.constraints)[place] for plan in others)
            assert figures(error.nearest, case.constraints)[place] == pytest.approx(least)


def test_the_budget_that_is_offered_is_feasible_when_sent(refused: Refused) -> None:
    for case, error in refused:
        offered = merged(case.constraints, error.budget)
        plan = solve(case.candidates, offered).plan
        assert not missed(plan, offered)
        assert plan.quality >= error.nearest.quality


@pytest.mark.parametrize(
    ("column", "value", "constraints"),
    [
        ("p95", 2.5537, Constraints(max_latency_seconds=0.1)),
        ("quality", 0.9997999999999999, Constraints(min_quality=1)),
    ],
)
def test_a_figure_of_few_digits_is_offered_whole(
    candidates: Candidates, column: str, value: float, constraints: Constraints
) -> None:
    same = replace(candidates, **{column: np.full(len(candidates.depth), value)})
    with pytest.raises(Infeasible) as error:
        solve(same, constraints)
    solve(same, merged(constraints, error.value.budget))


def test_a_refusal_says_what_would_be_enough(candidates: Candidates) -> None:
    with pytest.raises(Infeasible) as error:
        solve(candidates, Budget(max_mem_gb=1e-6).constraints)
    nearest = error.value.nearest
    assert (nearest.depth, nearest.rank, nearest.mode) == (2, 8, Mode.FACTORED)
    enough = error.value.budget["max_mem_gb"]
    assert 0 <= enough * 1e9 - nearest.predicted.memory_bytes < 1000
    assert str(error.value) == (
        f"no size fits; the nearest (depth 2, rank 8, factored, {nearest.dtype}, n=4) "
        f"needs max_mem_gb {enough:.6g}"
    )


def test_without_a_budget_the_best_of_the_family_is_the_plan(candidates: Candidates) -> None:
    solution = solve(candidates, Constraints())
    plan = solution.plan
    assert (plan.depth, plan.rank, plan.dtype, plan.quality) == (4, 48, DType.FLOAT32, 1)
    assert solution.binding == ()
    assert (solution.slack.memory_bytes, solution.slack.latency_seconds) == (None, None)


def test_people_state_gigabytes_and_milliseconds() -> None:
    budget = Budget(max_mem_gb=0.5, max_latency_ms=250, min_quality=0.9, depth=3)
    assert budget.constraints == Constraints(
        max_mem_bytes=500_000_000, max_latency_seconds=0.25, min_quality=0.9, depth=3
    )
    assert Budget().constraints == Constraints()
    median = Budget(max_latency_ms=250, latency_percentile=50).constraints
    assert median == Constraints(max_latency_seconds=0.25, latency_percentile=50)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"mode": Mode.MATERIALISED, "dtype": DType.INT3}, "dtype int3 is for mode factored"),
        ({"depth": 5}, "the family has no depth 5; choose one of 2, 3, 4"),
        ({"rank": 16}, "the family has no rank 16; choose one of 8, 24, 48"),
    ],
)
def test_what_cannot_be_says_why(
    candidates: Candidates, fixed: dict[str, object], message: str
) -> None:
    with pytest.raises(Impossible, match=message):
        solve(candidates, Constraints.model_validate(fixed))


def test_an_execution_that_was_not_profiled_is_impossible() -> None:
    candidates = candidates_of(layers=device_profile(NETWORK, SIZES).layers[:1])
    with pytest.raises(Impossible, match="no mode materialised; choose one of factored"):
        solve(candidates, Constraints(mode=Mode.MATERIALISED))
    with pytest.raises(Impossible, match="no dtype int8; choose one of float32"):
        solve(candidates, Constraints(dtype=DType.INT8))


def test_storage_of_unknown_loss_is_impossible() -> None:
    only = {"dtype_loss_ratios": {DType.FLOAT32: 1.0}, "materialised_loss_ratios": {}}
    candidates = candidates_of(quality_table(SIZES, **only))
    assert {p.dtype for p in solve(candidates, Constraints()).front} == {DType.FLOAT32}
    with pytest.raises(Impossible, match="fix less"):
        solve(candidates, Constraints(dtype=DType.INT8))
