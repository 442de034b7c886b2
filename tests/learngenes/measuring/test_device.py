import statistics

import pytest
import torch

from learngenes.config import Size
from learngenes.device import device_class, native_bfloat16, packing_threads
from learngenes.family.family import Family, load_family
from learngenes.family.synthetic import write_synthetic_family
from learngenes.measuring.device import MOST_P95_RATIO, measure_profile
from learngenes.measuring.model import run
from learngenes.model.sigma import interpolated
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import memory_bytes
from learngenes.sizing.profile import DeviceProfile
from tests.support.sizing import EXECUTIONS, NETWORK, SIZES

Told = list[tuple[float, str]]


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


def test_every_execution_is_profiled(profile: DeviceProfile) -> None:
    assert [(e.mode, e.dtype) for e in profile.executions] == EXECUTIONS


def test_it_says_what_it_was_measured_with(profile: DeviceProfile, random_family: Family) -> None:
    cpu = torch.device("cpu")
    assert profile.family == "random"
    kept = profile.model_dump_json()
    assert DeviceProfile.fitting(kept, random_family.fingerprint, torch.__version__) == profile
    assert profile.device_class == device_class(cpu)
    assert profile.native_bfloat16 == native_bfloat16(cpu)
    assert profile.packing_threads == packing_threads(cpu)
    assert profile.process_base_bytes == 123


def test_its_grid_spans_the_ranks_and_doubles_the_rows(profile: DeviceProfile) -> None:
    assert profile.ranks == (8, 48)
    assert profile.rows == tuple(2**i for i in range(len(profile.rows)))
    assert len(profile.step_seconds) == len(profile.rows)
    for cost in profile.layers:
        assert len(cost.seconds) == (2 if cost.mode == "factored" else 1)
        assert all(len(row) == len(profile.rows) for row in cost.seconds)


def test_every_size_takes_some_time(profile: DeviceProfile) -> None:
    for execution in profile.executions:
        for depth in SIZES.depths:
            for rank in SIZES.ranks:
                assert profile.latency_seconds(depth, rank, execution, Workload()) > 0


def test_whole_batches_take_about_what_is_predicted(
    profile: DeviceProfile, random_family: Family
) -> None:
    workload, diffusion = Workload(num_inference_steps=10), random_family.manifest.diffusion
    scales = interpolated(random_family.scales, Size(depth=3, rank=24))
    for execution in profile.executions:
        model = random_family.assemble(scales, execution.mode, execution.dtype)
        measured = statistics.median(run(model, diffusion, workload) for _ in range(5))
        predicted = float(profile.latency_seconds(3, 24, execution, workload))
        assert predicted / 5 < measured < predicted * 5


def test_the_tail_is_wider_than_the_median_but_not_by_much(profile: DeviceProfile) -> None:
    assert 1 < profile.p95_ratio <= MOST_P95_RATIO


def test_libraries_take_little_beside_the_live_set(profile: DeviceProfile) -> None:
    smallest = memory_bytes(NETWORK, 2, 8, profile.executions[0], Workload(n=1, guided=False))
    assert profile.memory_overhead_bytes < 0.2 * smallest


def test_progress_is_told_until_all_is_done(profile: DeviceProfile, told: Told) -> None:
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] == 1
    assert told[0][1] == "layers, 1 rows"
    assert told[-1] == (1, "done")
    assert "whole batches" in {what for _, what in told}
