import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
import torch
from structlog.testing import capture_logs

from learngenes.config import DType, Mode
from learngenes.family.family import Family
from learngenes.measuring.device import OnProgress
from learngenes.measuring.model import Measurement
from learngenes.sizing.budget import Constraints, Cost, Workload
from learngenes.sizing.cost import memory_bytes, shared_bytes
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import solve
from registry.settings import Settings
from tests.support.devices import keep_profile, made_up_profile
from worker.build.profiles import (
    PROCESS_MARGIN,
    candidates,
    correct_profile,
    ensure_profile,
    process_base_bytes,
    refresh_profile,
    stored_profile,
)
from worker.build.verify import Specimen
from worker.runtime import Runtime

SAID = (0.5, "layers")
WORKLOAD = Workload(n=4, num_inference_steps=2)


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    """A worker on a device that nobody has profiled."""
    return Runtime.start(settings)


class Measuring:
    """In place of measuring a profile; takes a moment only."""

    def __init__(self) -> None:
        self.profiles: list[DeviceProfile] = []

    def __call__(
        self, family: Family, _: Path, seconds: float, on_progress: OnProgress
    ) -> DeviceProfile:
        time.sleep(0.05)
        on_progress(*SAID)
        update = {"request_seconds": seconds + len(self.profiles)}
        self.profiles.append(made_up_profile(family).model_copy(update=update))
        return self.profiles[-1]


@pytest.fixture
def measuring() -> Measuring:
    return Measuring()


def test_a_device_is_measured_once(runtime: Runtime, measuring: Measuring) -> None:
    first, again = (ensure_profile(runtime, "tiny", measuring) for _ in range(2))
    assert measuring.profiles == [first]
    assert again == first
    assert first.request_seconds == runtime.settings.profile_seconds
    assert runtime.repository.profiled_classes("tiny") == [runtime.device_class]
    assert stored_profile(runtime, "tiny") == first


def test_workers_of_one_device_class_do_not_measure_at_the_same_time(
    runtime: Runtime, settings: Settings, measuring: Measuring
) -> None:
    barrier = threading.Barrier(2)

    def ensure(runtime: Runtime) -> DeviceProfile:
        barrier.wait()
        return ensure_profile(runtime, "tiny", measuring)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(ensure, (runtime, Runtime.start(settings)))
    assert one == other
    assert len(measuring.profiles) == 1


def test_a_profile_that_fits_is_used_as_it_is(
    runtime: Runtime, profile: DeviceProfile, measuring: Measuring
) -> None:
    learnt = profile.model_copy(update={"speed_correction": 1.5})
    keep_profile(runtime.repository, learnt)
    assert ensure_profile(runtime, "tiny", measuring) == learnt
    assert measuring.profiles == []


@pytest.mark.parametrize(
    "change", [{"torch_version": "1.0"}, {"family_fingerprint": "another"}, {"version": 0}]
)
def test_a_stale_profile_is_measured_again(
    runtime: Runtime, profile: DeviceProfile, measuring: Measuring, change: dict[str, object]
) -> None:
    keep_profile(runtime.repository, profile.model_copy(update=change))
    assert stored_profile(runtime, "tiny") is None
    fresh = ensure_profile(runtime, "tiny", measuring)
    assert measuring.profiles == [fresh]
    assert stored_profile(runtime, "tiny") == fresh
    assert fresh.torch_version == torch.__version__


def test_a_profile_that_cannot_be_read_is_measured_again(
    runtime: Runtime, measuring: Measuring
) -> None:
    runtime.repository.change_profile(runtime.device_class, "tiny", lambda _: "{")
    assert ensure_profile(runtime, "tiny", measuring) == measuring.profiles[0]


def test_refreshing_measures_in_any_case_and_says_how_far_it_is(
    runtime: Runtime, profile: DeviceProfile, measuring: Measuring
) -> None:
    keep_profile(runtime.repository, profile)
    said: list[tuple[float, str]] = []
    with capture_logs() as logs:
        fresh = refresh_profile(runtime, "tiny", lambda *told: said.append(told), measuring)
    assert stored_profile(runtime, "tiny") == fresh == measuring.profiles[0]
    assert said == [SAID]
    assert [line["event"] for line in logs] == ["profiling", "profiled"]


def test_the_process_is_what_a_model_in_int8_needs_beside_itself(
    runtime: Runtime, profile: DeviceProfile
) -> None:
    specimens: list[Specimen] = []

    def verify(specimen: Specimen) -> Measurement:
        specimens.append(specimen)
        return Measurement(Cost(10**6, 3 * 10**8, 0.1, 0.1), latency_runs=1)

    family = runtime.family("tiny")
    base = process_base_bytes(family, runtime.directories["tiny"], verify)
    (specimen,) = specimens
    assert (specimen.mode, specimen.dtype) == (Mode.FACTORED, DType.INT8)
    assert (specimen.depth, specimen.rank, specimen.own) == (2, 48, None)
    assert specimen.family == runtime.settings.families_dir / "tiny"
    int8 = (Mode.FACTORED, DType.INT8)
    (execution,) = (e for e in profile.executions if (e.mode, e.dtype) == int8)
    network = family.manifest.network
    own = memory_bytes(network, 2, 48, execution, Workload(1, 1))
    shared = shared_bytes(network, 48, execution)
    assert base / PROCESS_MARGIN == pytest.approx(3 * 10**8 - int(own) + int(shared), abs=1)


SIZE = Constraints(depth=3, rank=24, mode=Mode.MATERIALISED, dtype=DType.FLOAT32)


def predict(runtime: Runtime) -> Callable[[DeviceProfile], Cost]:
    """Of SIZE."""
    family = runtime.family("tiny")
    return lambda profile: solve(candidates(family, profile, WORKLOAD), SIZE).plan.predicted


def missed(
    runtime: Runtime, profile: DeviceProfile, *, more_bytes: int, times_slower: float
) -> tuple[Cost, Cost]:
    """What is predicted for SIZE, and a measurement that is so much more."""
    predicted = predict(runtime)(profile)
    measured = Cost(
        predicted.memory_bytes + more_bytes,
        predicted.process_memory_bytes + 3 * more_bytes,
        predicted.latency_seconds * times_slower,
        predicted.latency_seconds * times_slower,
    )
    return predicted, measured


def test_a_correction_is_stored(runtime: Runtime, profile: DeviceProfile) -> None:
    keep_profile(runtime.repository, profile)
    predicted, measured = missed(runtime, profile, more_bytes=100, times_slower=4)
    told = correct_profile(runtime, runtime.family("tiny"), profile, predict(runtime), measured)
    corrected = stored_profile(runtime, "tiny")
    assert corrected == told == profile.corrected(predicted, measured)
    assert corrected.memory_overhead_bytes == profile.memory_overhead_bytes + 100
    assert corrected.process_base_bytes == profile.process_base_bytes + 200
    assert corrected.speed_correction == pytest.approx(2)


def test_what_several_workers_measure_is_learned_once(
    runtime: Runtime, profile: DeviceProfile
) -> None:
    keep_profile(runtime.repository, profile)
    family = runtime.family("tiny")
    _, measured = missed(runtime, profile, more_bytes=100, times_slower=1)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(correct_profile, runtime, family, profile, predict(runtime), measured)
    corrected = stored_profile(runtime, "tiny")
    assert corrected is not None
    assert corrected.memory_overhead_bytes == profile.memory_overhead_bytes + 100
    assert corrected.process_base_bytes == profile.process_base_bytes + 200


def test_a_worker_that_dies_while_profiling_blocks_the_next_for_a_lease_only(
    runtime: Runtime, profile: DeviceProfile, client: redis.Redis
) -> None:
    """The lock is renewed for as long as it is held, and is short."""
    name = f"device:{runtime.device_class}"
    left: list[float] = []

    def measure_slowly(*_: object) -> DeviceProfile:
        time.sleep(1.3 * runtime.settings.lease_seconds)
        left.append(client.pttl(f"fineserve:lock:{name}") / 1000)
        return profile

    assert ensure_profile(runtime, "tiny", measure_slowly) == profile
    assert 0 < left[0] <= runtime.settings.lease_seconds
    with runtime.repository.lock(name, 1):
        assert stored_profile(runtime, "tiny") == profile
