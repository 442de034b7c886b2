"""Sizes and samplings chosen together, by what pictures were measured to be worth."""

import itertools
import math

import numpy as np
import pytest
from pydantic import ValidationError

from learngenes.config import DType, Mode, Sampling, SamplingRequest, Scheduler, Size
from learngenes.sizing.budget import Constraints, Plan, Workload
from learngenes.sizing.quality import DEFAULT_SAMPLING, QualityTable
from learngenes.sizing.solver import Candidates, Impossible, Infeasible, solve
from tests.support.sizing import GUIDE, NETWORK, SIZES, device_profile, pictures, quality_table

PROFILE = device_profile(NETWORK, SIZES)
TABLE = quality_table(SIZES, pictures=pictures(SIZES))
LATENCIES = [0.02 * 1.15**i for i in range(50)]


def candidates(asked: SamplingRequest | None = None, table: QualityTable = TABLE) -> Candidates:
    workloads = (Workload(4, s) for s in table.samplings(asked or SamplingRequest()))
    return Candidates.of(NETWORK, SIZES, table, PROFILE, *workloads)


def planned(asked: SamplingRequest | None = None, **budget: object) -> Plan:
    return solve(candidates(asked), Constraints.model_validate(budget)).plan


def brute_force() -> list[Plan]:
    """Every plan, each solved for alone: one size in one execution by one sampling."""
    plans = []
    for sampling in TABLE.samplings(SamplingRequest()):
        alone = Candidates.of(NETWORK, SIZES, TABLE, PROFILE, Workload(4, sampling))
        for depth, rank, execution in itertools.product(
            SIZES.depths, SIZES.ranks, alone.executions
        ):
            fixed = {"mode": execution.mode, "dtype": execution.dtype}
            try:
                plans.append(solve(alone, Constraints(depth=depth, rank=rank, **fixed)).plan)
            except Impossible:
                assert sampling.guide is not None
                assert not sampling.guide.smaller_than(Size(depth=depth, rank=rank))
    return plans


def test_no_measured_plan_within_a_latency_is_better() -> None:
    every, plans = brute_force(), []
    for seconds in LATENCIES:
        within = [p for p in every if p.predicted.latency_p95_seconds <= seconds]
        try:
            plan = planned(max_latency_seconds=seconds)
        except Infeasible:
            assert not within
            continue
        assert plan.predicted.latency_p95_seconds <= seconds
        assert plan.quality == max(p.quality for p in within)
        plans.append(plan)
    assert len({plan.sampling for plan in plans}) > 3
    assert len({(plan.depth, plan.rank) for plan in plans}) > 1
    assert [plan.quality for plan in plans] == sorted(plan.quality for plan in plans)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_inference_steps": 7},
        {"num_inference_steps": 20, "guidance_scale": 1},
        {"guide": GUIDE},
        {"guidance_scale": 2, "guidance_start": 0.2, "guidance_stop": 0.8},
        {"scheduler": "ddim"},
        {"guidance_scale": 5},
        {"num_inference_steps": 100},
    ],
)
def test_what_the_caller_gave_is_never_changed(asked: dict[str, object]) -> None:
    request = SamplingRequest.model_validate(asked)
    for seconds in LATENCIES[20::5]:
        plan = planned(request, max_latency_seconds=seconds)
        assert plan.sampling is not None
        assert request.over(plan.sampling) == plan.sampling


def test_between_two_numbers_of_steps_pictures_are_between() -> None:
    def distance(steps: int) -> float:
        asked = SamplingRequest(num_inference_steps=steps, guidance_scale=1)
        found = planned(asked, depth=4, rank=48, dtype="float32").distance
        assert found is not None
        return found

    assert distance(10) == 100 + 400 / 4 + 2000 / 48 + 100
    distances = [distance(steps) for steps in range(5, 21)]
    assert distances == sorted(distances, reverse=True)
    assert distance(7) == pytest.approx(
        np.interp(math.log(7), [math.log(5), math.log(10)], [distance(5), distance(10)])
    )


def test_what_nobody_has_measured_is_planned_by_loss() -> None:
    plan = planned(SamplingRequest(scheduler=Scheduler.EULER), max_mem_bytes=10**9)
    assert (plan.distance, plan.class_accuracy, plan.quality) == (None, None, 1)
    assert plan.sampling == DEFAULT_SAMPLING.model_copy(update={"scheduler": "euler"})
    other = TABLE.of_other_classes
    assert other.samplings(SamplingRequest()) == (DEFAULT_SAMPLING,)
    assert solve(candidates(table=other), Constraints()).plan.distance is None


def test_quality_is_the_share_of_the_way_to_real_pictures() -> None:
    best = planned(dtype="float32")
    worst = 100 + 400 / SIZES.depths[0] + 2000 / SIZES.ranks[0] + 1000 / 5
    assert best.distance is not None
    shown = 1 - 1 / (SIZES.depths[-1] + SIZES.ranks[-1] + 20)
    assert best.class_accuracy == pytest.approx(shown)
    assert best.quality == pytest.approx(shown * (worst - best.distance) / (worst - 90))
    assert best.sampling == Sampling(
        num_inference_steps=20, scheduler=Scheduler.DPMSOLVER, guide=GUIDE
    )


def test_a_plan_does_not_lose_the_class_for_a_little_less_distance() -> None:
    made = pictures(SIZES)
    vague = tuple(
        each.model_copy(
            update={"accuracies": tuple(tuple(0.8 * a for a in row) for row in each.accuracies)}
        )
        if each.sampling.guide
        else each
        for each in made.tables
    )
    other = TABLE.model_copy(update={"pictures": made.model_copy(update={"tables": vague})})
    found = solve(candidates(table=other), Constraints(dtype=DType.FLOAT32)).plan
    assert found.sampling.guide is None
    assert found.distance is not None
    assert found.distance > (planned(dtype="float32").distance or 0)


def test_rounded_weights_make_pictures_worse() -> None:
    fixed = {"depth": 2, "rank": 24, "mode": Mode.FACTORED}
    distances = [
        planned(SamplingRequest(num_inference_steps=10), dtype=dtype, **fixed).distance
        for dtype in (DType.FLOAT32, DType.INT8, DType.INT4, DType.INT3)
    ]
    assert distances == sorted(distances, key=lambda d: d or 0)
    assert len(set(distances)) == len(distances)


def test_a_guide_costs_its_memory_and_its_time() -> None:
    fixed = {"depth": 4, "rank": 48, "mode": "materialised", "dtype": "float32"}
    steps = {"num_inference_steps": 10}
    alone, guided, by_class = (
        planned(SamplingRequest.model_validate({**steps, **guidance}), **fixed).predicted
        for guidance in (
            {"guidance_scale": 1},
            {"guide": GUIDE},
            {"guidance_scale": 2, "guidance_start": 0, "guidance_stop": 1},
        )
    )
    assert alone.memory_bytes < by_class.memory_bytes < guided.memory_bytes
    assert alone.latency_seconds < min(guided.latency_seconds, by_class.latency_seconds)


def test_candidates_can_be_asked_again_and_again() -> None:
    kept = candidates()
    asked = [
        {"max_latency_seconds": 0.05},
        {"max_latency_seconds": 0.05, "depth": 3},
        {"max_mem_bytes": 10**9, "mem_scope": "process"},
        {"max_latency_seconds": 0.08},
        *({"rank": rank, "dtype": dtype} for rank in SIZES.ranks for dtype in DType),
        {"max_latency_seconds": 0.05},
    ]
    for budget in asked:
        constraints = Constraints.model_validate(budget)
        assert solve(kept, constraints) == solve(candidates(), constraints)


def test_a_table_of_another_shape_is_refused() -> None:
    made = pictures(SIZES)
    short = made.tables[0].model_copy(update={"distances": made.tables[0].distances[1:]})
    with pytest.raises(ValidationError, match="rows of"):
        QualityTable.model_validate(
            {**TABLE.model_dump(), "pictures": made.model_copy(update={"tables": (short,)})}
        )
