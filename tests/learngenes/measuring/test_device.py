import statistics
from dataclasses import replace

import pytest
import torch

from learngenes.config import DType
from learngenes.device import device_class, native_bfloat16, packing_threads
from learngenes.family.family import Family, load_family
from learngenes.family.synthetic import write_synthetic_family
from learngenes.measuring.device import (
    FEWEST_ROWS,
    SERVED_RATIO,
    ComputeTimes,
    computes,
    estimate_profile,
    measure_profile,
    measure_times,
    with_times,
)
from learngenes.measuring.steps import batch_of, own_model, seconds_a_step
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import memory_bytes
from learngenes.sizing.profile import DeviceProfile
from learngenes.stepping.batch import Batch
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.weights import SharedWeights
from tests.support.sizing import EXECUTIONS, NETWORK, SIZES

Told = list[tuple[float, str]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def random_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp("families") / "random"
    write_synthetic_family(directory, NETWORK, SIZES)
    return load_family(directory)


@pytest.fixture(scope="module")
def told() -> Told:
    return []


@pytest.fixture(scope="module")
def profile(random_family: Family, told: Told) -> DeviceProfile:
    """Measured once for all tests here."""
    return measure_profile(
        random_family, 123, max_seconds=1, on_progress=lambda *progress: told.append(progress)
    )


@pytest.fixture(scope="module")
def estimate(random_family: Family) -> DeviceProfile:
    return estimate_profile(random_family, 456, max_seconds=0.2)


def test_every_execution_is_profiled(profile: DeviceProfile, estimate: DeviceProfile) -> None:
    for each in (profile, estimate):
        assert [(e.mode, e.dtype) for e in each.executions] == EXECUTIONS


def test_a_network_whose_steps_take_too_long_is_estimated_by_the_fewest(
    random_family: Family,
) -> None:
    hurried = estimate_profile(random_family, 456, max_seconds=0)
    assert {layer.rows for layer in hurried.layers} == {FEWEST_ROWS}
    assert all(min(layer.step_seconds) >= 0 for layer in hurried.layers)


def test_it_says_what_it_was_measured_with(profile: DeviceProfile, random_family: Family) -> None:
    assert profile.family == "random"
    kept = profile.model_dump_json()
    assert DeviceProfile.fitting(kept, random_family.fingerprint, torch.__version__) == profile
    assert profile.device_class == device_class(CPU)
    assert profile.native_bfloat16 == native_bfloat16(CPU)
    assert profile.packing_threads == packing_threads(CPU)
    assert profile.process_base_bytes == 123


def test_an_estimate_says_that_it_is_one(profile: DeviceProfile, estimate: DeviceProfile) -> None:
    assert (estimate.estimated, estimate.memory_estimated) == (True, True)
    assert (profile.estimated, profile.memory_estimated) == (False, False)


def test_its_grid_spans_the_ranks_and_doubles_the_rows(profile: DeviceProfile) -> None:
    for cost in profile.layers:
        assert cost.rows == tuple(2**i for i in range(len(cost.rows)))
        assert cost.ranks == (8, 24, 48)


def test_every_size_takes_some_time(profile: DeviceProfile, estimate: DeviceProfile) -> None:
    for each in (profile, estimate):
        for execution in each.executions:
            for depth in SIZES.depths:
                for rank in SIZES.ranks:
                    assert each.latency_seconds(depth, rank, execution, Workload()) > 0


def test_a_step_takes_about_what_is_predicted(
    profile: DeviceProfile, random_family: Family
) -> None:
    shared = SharedWeights(random_family, DType.FLOAT32)
    with torch.inference_mode():
        model = own_model(shared, 48, materialised=True, depth=3)
        batch = batch_of([model], 8, Kernels())
        measured = statistics.median(seconds_a_step(batch, 1) for _ in range(5))
    execution = next(e for e in profile.executions if (e.mode, e.dtype) == EXECUTIONS[5])
    assert (execution.mode, execution.dtype) == ("materialised", "float32")
    ten, one = (
        float(profile.latency_seconds(3, 48, execution, Workload.of(4, num_inference_steps=steps)))
        for steps in (11, 1)
    )
    assert (ten - one) / 50 < measured < (ten - one) / 2


def test_depth_rank_and_rows_are_told_apart(random_family: Family) -> None:
    """A device on which a step takes a second, and each layer as much as rows and rank say, when
    requests are served.
    """

    def as_if(batch: Batch, _: int) -> float:
        model, rows = batch.parts[0].model, len(batch.parts[0].x)
        layer = 1.0 if model.materialised is not None else model.rank / 100
        return (1.0 + model.depth * layer * rows) / SERVED_RATIO

    shared = SharedWeights(random_family, DType.FLOAT32)
    times = measure_times(shared, Kernels(), max_rows=8, max_seconds=1000, seconds_of=as_if)
    assert times.rows == (1, 2, 4, 8)
    assert times.step == pytest.approx((1, 1, 1, 1))
    assert times.written_out == pytest.approx((1, 2, 4, 8))
    assert set(times.factored) == {8, 24, 48}
    assert times.factored[24] == pytest.approx((0.24, 0.48, 0.96, 1.92))
    assert times.image_seconds > 0


def test_what_is_faster_by_factors_is_predicted_as_the_engine_steps_it(
    estimate: DeviceProfile, random_family: Family
) -> None:
    times = ComputeTimes((2,), (0.0,), (0.5,), {8: (0.25,), 48: (0.75,)}, 0.01)
    costs = with_times(estimate, random_family, {torch.float32: times}).layers
    found = {c.mode: c.seconds for c in costs if c.dtype is DType.FLOAT32}
    assert found == {"factored": ((0.25,), (0.75,)), "materialised": ((0.25,), (0.5,))}


def test_noise_makes_nothing_take_less_than_no_time(random_family: Family) -> None:
    def backwards(batch: Batch, _: int) -> float:
        return 1 / batch.parts[0].model.depth / SERVED_RATIO

    shared = SharedWeights(random_family, DType.FLOAT32)
    times = measure_times(shared, Kernels(), max_rows=2, max_seconds=1000, seconds_of=backwards)
    assert times.written_out == (0, 0)
    assert times.step == pytest.approx((0.25, 0.25))


def test_rounding_makes_nothing_take_less_than_no_time(random_family: Family) -> None:
    manifest = random_family.manifest
    sizes = manifest.sizes.model_copy(update={"depths": (1, 2, 3)})
    shallow = manifest.model_copy(update={"sizes": sizes})
    shared = SharedWeights(replace(random_family, manifest=shallow), DType.FLOAT32)

    def in_proportion(batch: Batch, _: int) -> float:
        return 0.59 * batch.parts[0].model.depth  # three thirds of it are more than it

    times = measure_times(shared, Kernels(), 2, 1000, seconds_of=in_proportion)
    assert times.step == (0, 0)


def test_what_was_measured_takes_the_place_of_an_estimate(
    estimate: DeviceProfile, random_family: Family
) -> None:
    compute = torch.float32
    times = ComputeTimes((2,), (0.5,), (0.25,), {8: (0.125,)}, 0.01)
    measured = with_times(estimate, random_family, {compute: times})
    assert measured.image_seconds == 0.01
    changed = {cost.dtype for cost in measured.layers if not cost.estimated}
    native = native_bfloat16(CPU)
    assert changed == ({DType.FLOAT32} if native else set(DType))
    assert measured.estimated == native
    assert [(e.mode, e.dtype) for e in measured.executions] == EXECUTIONS


def test_a_device_has_a_dtype_for_each_that_it_computes_in() -> None:
    assert computes(CPU)[torch.float32] is DType.FLOAT32 or not native_bfloat16(CPU)
    assert len(computes(CPU)) == 1 + native_bfloat16(CPU)


def test_libraries_take_little_beside_the_live_set(profile: DeviceProfile) -> None:
    smallest = memory_bytes(
        NETWORK, 2, 8, profile.executions[0], Workload.of(n=1, guidance_scale=1)
    )
    assert profile.memory_overhead_bytes < 0.2 * smallest


def test_progress_is_told_until_all_is_done(profile: DeviceProfile, told: Told) -> None:
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] == 1
    assert told[-1] == (1, "done")
