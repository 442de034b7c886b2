import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from structlog.testing import capture_logs

from learngenes.config import DType, Mode
from learngenes.family.family import Family
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
from worker.build.verify import Verification
from worker.runtime import Runtime

SAID = (0.5, "layers")
WORKLOAD = Workload(n=4, num_inference_steps=2)


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    """A worker on a device that nobody has profiled."""
    return Runtime.start(settings)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[DeviceProfile]:
    """Every profile that was measured, in order; measuring one takes a moment only."""
    profiles: list[DeviceProfile] = []

    def measure(
        family: Family, base: int, seconds: float, on_progress: Callable[[float, str], None]
    ) -> DeviceProfile:
        time.sleep(0.05)
        on_progress(*SAID)
        update = {"process_base_bytes": base, "request_seconds": seconds + len(profiles)}
        profiles.append(made_up_profile(family).model_copy(update=update))
        return profiles[-1]

    monkeypatch.setattr("worker.build.profiles.measure_profile", measure)
    monkeypatch.setattr("worker.build.profiles.process_base_bytes", lambda *_: 123)
    return profiles


def test_a_device_is_measured_once(runtime: Runtime, measured: list[DeviceProfile]) -> None:
    first, again = (ensure_profile(runtime, "tiny") for _ in range(2))
    assert measured == [first]
    assert again == first
    assert first.process_base_bytes == 123
    assert first.request_seconds == runtime.settings.profile_seconds
    assert runtime.repository.profiled_classes("tiny") == [runtime.device_class]
    assert stored_profile(runtime, "tiny") == first


def test_workers_of_one_device_class_do_not_measure_at_the_same_time(
    runtime: Runtime, settings: Settings, measured: list[DeviceProfile]
) -> None:
    barrier = threading.Barrier(2)

    def ensure(runtime: Runtime) -> DeviceProfile:
        barrier.wait()
        return ensure_profile(runtime, "tiny")

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(ensure, (runtime, Runtime.start(settings)))
    assert one == other
    assert len(measured) == 1


def test_a_profile_that_fits_is_used_as_it_is(
    runtime: Runtime, profile: DeviceProfile, measured: list[DeviceProfile]
) -> None:
    learnt = profile.model_copy(update={"speed_correction": 1.5})
    keep_profile(runtime.repository, learnt)
    assert ensure_profile(runtime, "tiny") == learnt
    assert measured == []


@pytest.mark.parametrize(
    "change", [{"torch_version": "1.0"}, {"family_fingerprint": "another"}, {"version": 0}]
)
def test_a_stale_profile_is_measured_again(
    runtime: Runtime,
    profile: DeviceProfile,
    measured: list[DeviceProfile],
    change: dict[str, object],
) -> None:
    keep_profile(runtime.repository, profile.model_copy(update=change))
    assert stored_profile(runtime, "tiny") is None
    fresh = ensure_profile(runtime, "tiny")
    assert measured == [fresh]
    assert stored_profile(runtime, "tiny") == fresh
    assert fresh.torch_version == torch.__version__


def test_a_profile_that_cannot_be_read_is_measured_again(
    runtime: Runtime, measured: list[DeviceProfile]
) -> None:
    runtime.repository.change_profile(runtime.device_class, "tiny", lambda _: "{")
    assert ensure_profile(runtime, "tiny") == measured[0]


def test_refreshing_measures_in_any_case_and_says_how_far_it_is(
    runtime: Runtime, profile: DeviceProfile, measured: list[DeviceProfile]
) -> None:
    keep_profile(runtime.repository, profile)
    said: list[tuple[float, str]] = []
    with capture_logs() as logs:
        fresh = refresh_profile(runtime, "tiny", lambda *told: said.append(told))
    assert stored_profile(runtime, "tiny") == fresh == measured[0]
    assert said == [(0, "a process of its own"), SAID]
    assert [line["event"] for line in logs] == ["profiling", "profiled"]


def test_the_process_is_what_a_model_in_int8_needs_beside_itself(
    runtime: Runtime, profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Verification] = []

    def verify(request: Verification) -> Measurement:
        requests.append(request)
        return Measurement(Cost(10**6, 3 * 10**8, 0.1, 0.1), latency_runs=1)

    monkeypatch.setattr("worker.build.profiles.verify", verify)
    family = runtime.family("tiny")
    base = process_base_bytes(family, runtime.directories["tiny"])
    (request,) = requests
    assert (request.mode, request.dtype) == (Mode.FACTORED, DType.INT8)
    assert (request.depth, request.rank, request.own) == (2, 48, None)
    assert request.family == runtime.settings.families_dir / "tiny"
    (execution,) = (e for e in profile.executions if e.dtype is DType.INT8)
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
    correct_profile(runtime, runtime.family("tiny"), predict(runtime), measured)
    corrected = stored_profile(runtime, "tiny")
    assert corrected == profile.corrected(predicted, measured)
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
            pool.submit(correct_profile, runtime, family, predict(runtime), measured)
    corrected = stored_profile(runtime, "tiny")
    assert corrected is not None
    assert corrected.memory_overhead_bytes == profile.memory_overhead_bytes + 100
    assert corrected.process_base_bytes == profile.process_base_bytes + 200


def test_a_worker_that_dies_while_profiling_blocks_the_next_for_a_lease_only(
    runtime: Runtime, profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is renewed for as long as it is held, and is short."""
    name = f"device:{runtime.device_class}"
    left: list[float] = []

    def measure_slowly(*_: object) -> DeviceProfile:
        time.sleep(1.3 * runtime.settings.lease_seconds)
        left.append(runtime.repository._redis.pttl(f"fineserve:lock:{name}") / 1000)
        return profile

    monkeypatch.setattr("worker.build.profiles.process_base_bytes", lambda *_: 1)
    monkeypatch.setattr("worker.build.profiles.measure_profile", measure_slowly)
    assert ensure_profile(runtime, "tiny") == profile
    assert 0 < left[0] <= runtime.settings.lease_seconds
    with runtime.repository.lock(name, 1):
        assert stored_profile(runtime, "tiny") == profile
