from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from learngenes.config import DType, Mode
from learngenes.sizing.budget import Cost, Workload
from learngenes.sizing.cost import Execution
from learngenes.sizing.profile import (
    MOST_CORRECTION,
    MOST_OBSERVATIONS,
    OBSERVATION_DAYS,
    P95_RATIO_RANGE,
    DeviceProfile,
    LayerCost,
    Observation,
)
from tests.support.sizing import NETWORK, ROWS, SIZES, device_profile, executions

FACTORED = Execution(Mode.FACTORED, DType.FLOAT32)
MATERIALISED = Execution(Mode.MATERIALISED, DType.FLOAT32)
PREDICTED = Cost(
    memory_bytes=1000, process_memory_bytes=5000, latency_seconds=1.0, latency_p95_seconds=1.2
)

every_execution = pytest.mark.parametrize("execution", executions(), ids=str)


@pytest.fixture
def profile() -> DeviceProfile:
    return device_profile(NETWORK, SIZES)


def latency(
    profile: DeviceProfile,
    depth: int = 3,
    rank: int = 24,
    execution: Execution = FACTORED,
    **workload: Any,
) -> float:
    return float(profile.latency_seconds(depth, rank, execution, Workload.of(**workload)))


AT = datetime(2026, 2, 1, tzinfo=UTC)


def after(profile: DeviceProfile, at: datetime = AT, **measured: float) -> DeviceProfile:
    """A profile after a measurement that is the prediction but for this."""
    cost = replace(PREDICTED, **measured)  # type: ignore[arg-type]
    return profile.corrected(PREDICTED, cost, profile.overhead_seconds, at)


def observed(profile: DeviceProfile, *ratios: float) -> DeviceProfile:
    """A profile after models that took so many times as long as was profiled."""
    seen = [Observation(ratio=ratio, overhead_seconds=0.001, at=AT) for ratio in ratios]
    return profile.model_copy(update={"observations": tuple(seen)})


def test_it_comes_back_from_json_as_it_was(profile: DeviceProfile) -> None:
    corrected = after(profile, latency_seconds=1.3)
    for each in (profile, corrected):
        assert DeviceProfile.model_validate_json(each.model_dump_json()) == each


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "Input should be 3"),
        ({"p95_ratio": 0.9}, "greater than or equal to 1"),
        ({"request_seconds": -1}, "greater than or equal to 0"),
        ({"flops": 1e12}, "Extra inputs"),
    ],
)
def test_a_profile_that_is_not_one_is_refused(
    profile: DeviceProfile, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        DeviceProfile.model_validate({**profile.model_dump(), **change})


def test_it_fits_the_weights_and_the_torch_it_was_measured_with(profile: DeviceProfile) -> None:
    kept, fitting = profile.model_dump_json(), DeviceProfile.fitting
    assert fitting(kept, "a-family", "2.0") == fitting(kept, "a-family", None) == profile
    assert fitting(kept, "another family", "2.0") is None
    assert fitting(kept, "a-family", "2.1") is None
    assert fitting('{"version": 0}', "a-family", "2.0") is None
    assert fitting(None, "a-family", "2.0") is None


def test_it_knows_the_executions_it_was_measured_in(profile: DeviceProfile) -> None:
    assert profile.executions == executions()
    native = device_profile(NETWORK, SIZES, native_bfloat16=True, packing_threads=2)
    assert native.executions == executions(native_bfloat16=True, packing_threads=2)


@every_execution
def test_latency_is_affine_in_depth(profile: DeviceProfile, execution: Execution) -> None:
    two, three, ten = (latency(profile, depth, execution=execution) for depth in (2, 3, 10))
    assert ten - two == pytest.approx(8 * (three - two))
    assert three > two


@every_execution
def test_beside_the_request_latency_is_linear_in_steps(
    profile: DeviceProfile, execution: Execution
) -> None:
    def steps(count: int) -> float:
        seconds = latency(profile, execution=execution, num_inference_steps=count)
        return seconds - profile.request_seconds

    assert steps(50) == pytest.approx(50 * steps(1))


def test_what_was_measured_is_what_is_predicted(profile: DeviceProfile) -> None:
    cost = profile.layers[0]
    assert cost.ranks == SIZES.ranks
    for row, rank in enumerate(SIZES.ranks):
        for column, rows in enumerate(ROWS):
            step = cost.step_seconds[column] + 4 * cost.seconds[row][column]
            predicted = latency(profile, 4, rank, n=rows, guidance_scale=1, num_inference_steps=10)
            assert predicted == pytest.approx(profile.request_seconds + 10 * step)


def test_between_two_ranks_latency_is_between_theirs(profile: DeviceProfile) -> None:
    four, eight, low, middle, high = (latency(profile, rank=r) for r in (4, 8, 24, 36, 48))
    assert middle == pytest.approx((low + high) / 2)
    assert four == eight
    written_out = {latency(profile, rank=rank, execution=MATERIALISED) for rank in (8, 48)}
    assert len(written_out) == 1  # W does not know its rank


def test_latency_is_linear_between_two_batches_and_beyond_the_largest(
    profile: DeviceProfile,
) -> None:
    four, ten, sixteen, forty = (latency(profile, n=n, guidance_scale=1) for n in (4, 10, 16, 40))
    assert ten == pytest.approx((four + sixteen) / 2)
    assert forty - sixteen == pytest.approx(2 * (sixteen - four))
    assert latency(profile, n=2, guidance_scale=2) == four  # a guided image costs two rows


def test_beyond_the_largest_batch_latency_never_falls() -> None:
    """Noise can make a larger batch look quicker than a smaller one."""
    whole = device_profile(NETWORK, SIZES)
    layer = whole.layers[0].model_copy(update={"step_seconds": (0.001, 0.9, 0.8)})
    noisy = whole.model_copy(update={"layers": (layer,)})
    assert latency(noisy, n=1000, guidance_scale=1) > latency(noisy, n=16, guidance_scale=1)


def test_a_profile_of_one_batch_holds_for_all() -> None:
    whole = device_profile(NETWORK, SIZES)
    layers = tuple(
        cost.model_copy(
            update={
                "rows": (1,),
                "step_seconds": cost.step_seconds[:1],
                "seconds": tuple(row[:1] for row in cost.seconds),
            }
        )
        for cost in whole.layers
    )
    one = device_profile(NETWORK, SIZES, layers=layers)
    assert latency(one, n=16) == latency(one, n=1, guidance_scale=1)


def test_a_table_that_is_not_one_is_refused(profile: DeviceProfile) -> None:
    cost = profile.layers[0].model_dump()
    for change in ({"rows": (1, 4)}, {"ranks": (8,)}, {"step_seconds": (0.1,)}):
        with pytest.raises(ValidationError, match="a row per rank, and a column per number"):
            LayerCost.model_validate({**cost, **change})


@every_execution
def test_many_sizes_are_computed_at_once(profile: DeviceProfile, execution: Execution) -> None:
    depths, ranks = np.array([2, 3, 9]), np.array([8, 30, 48])
    together = profile.latency_seconds(depths, ranks, execution, Workload())
    alone = [latency(profile, *size, execution) for size in zip(depths, ranks, strict=True)]
    assert together.tolist() == pytest.approx(alone)


def test_what_was_observed_corrects_the_work_and_not_the_request(profile: DeviceProfile) -> None:
    slower = observed(profile, 1.5, 1.5, 1.5)
    before = latency(profile) - profile.request_seconds
    assert latency(slower) - slower.overhead_seconds == pytest.approx(1.5 * before)


def test_an_execution_that_was_not_profiled_is_a_key_error(profile: DeviceProfile) -> None:
    some = profile.model_copy(update={"layers": profile.layers[:2]})
    with pytest.raises(KeyError, match="materialised float32 was not profiled"):
        latency(some, execution=MATERIALISED)


def test_one_model_alone_corrects_nothing_and_two_only_half(profile: DeviceProfile) -> None:
    for ratios, expected in (((), 1), ((1.4,), 1), ((1.4, 1.4), 1.2), ((1.4, 1.4, 1.4), 1.4)):
        assert observed(profile, *ratios).speed_correction == pytest.approx(expected)


def test_a_wild_one_among_others_moves_nothing(profile: DeviceProfile) -> None:
    assert observed(profile, 1.1, 1.1, 1.1, 1.1, 30.0).speed_correction == pytest.approx(1.1)


@pytest.mark.parametrize(("ratio", "bound"), [(30, MOST_CORRECTION), (0.01, 1 / MOST_CORRECTION)])
def test_it_is_corrected_within_bounds(profile: DeviceProfile, ratio: float, bound: float) -> None:
    assert observed(profile, *(ratio,) * 9).speed_correction == bound


def test_a_steady_drift_is_followed(profile: DeviceProfile) -> None:
    undisturbed = latency(profile)
    measured = replace(PREDICTED, latency_seconds=1.7 * undisturbed)
    for _ in range(20):
        predicted = replace(PREDICTED, latency_seconds=latency(profile))
        profile = profile.corrected(predicted, measured, profile.overhead_seconds, AT)
    assert latency(profile) == pytest.approx(1.7 * undisturbed, rel=1e-4)
    assert len(profile.observations) == MOST_OBSERVATIONS


def test_old_observations_are_forgotten(profile: DeviceProfile) -> None:
    seen = after(profile, latency_seconds=2)
    later = AT + timedelta(days=OBSERVATION_DAYS, seconds=1)
    assert len(after(seen).observations) == 2
    assert len(after(seen, later).observations) == 1


def test_the_overhead_is_what_requests_had(profile: DeviceProfile) -> None:
    seen = profile.corrected(PREDICTED, PREDICTED, 0.25, AT)
    assert (profile.overhead_seconds, seen.overhead_seconds) == (0.001, 0.25)


def test_what_was_disturbed_teaches_nothing_of_latency(profile: DeviceProfile) -> None:
    slow = replace(PREDICTED, memory_bytes=1300, latency_seconds=50, latency_p95_seconds=90)
    learned = profile.corrected(PREDICTED, slow, None, AT)
    assert learned.memory_overhead_bytes == profile.memory_overhead_bytes + 300
    assert (learned.observations, learned.p95_ratio) == ((), profile.p95_ratio)


def test_memory_that_was_missing_is_added_and_none_is_taken_away(profile: DeviceProfile) -> None:
    more = after(profile, memory_bytes=1300, process_memory_bytes=5400)
    assert more.memory_overhead_bytes == profile.memory_overhead_bytes + 300
    assert more.process_base_bytes == profile.process_base_bytes + 100  # 300 come with the model
    less = after(profile, memory_bytes=10, process_memory_bytes=50)
    assert less.memory_overhead_bytes == profile.memory_overhead_bytes
    assert less.process_base_bytes == profile.process_base_bytes


def test_a_missed_tail_widens_it_and_a_kept_one_narrows_it_a_little(profile: DeviceProfile) -> None:
    missed, kept = after(profile, latency_p95_seconds=1.3), after(profile)
    assert missed.p95_ratio > profile.p95_ratio > kept.p95_ratio
    assert missed.p95_ratio - profile.p95_ratio > 10 * (profile.p95_ratio - kept.p95_ratio)


@pytest.mark.parametrize(("p95", "end"), [(1.3, P95_RATIO_RANGE[1]), (1.1, P95_RATIO_RANGE[0])])
def test_the_tail_stays_within_its_range(profile: DeviceProfile, p95: float, end: float) -> None:
    for _ in range(300):
        profile = after(profile, latency_p95_seconds=p95)
    assert profile.p95_ratio == end


def test_three_misses_in_a_hundred_leave_the_tail_as_it_is(profile: DeviceProfile) -> None:
    before = profile.p95_ratio
    for i in range(100):
        profile = after(profile, latency_p95_seconds=1.3 if i % 33 == 32 else 1.1)
    assert profile.p95_ratio == pytest.approx(before)
