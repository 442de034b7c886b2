import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import torch

from benchmarks.deployment import wait
from learngenes.config import DType, Mode
from learngenes.family.family import Family
from learngenes.measuring.device import computes
from learngenes.measuring.model import Measurement
from learngenes.sizing.budget import Constraints, Cost, Workload
from learngenes.sizing.cost import memory_bytes, shared_bytes
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import solve
from learngenes.stepping.kernels import Kernels
from registry.settings import Settings
from tests.support.devices import keep_profile, made_up_profile
from tests.support.engines import Undisturbed, made_up_costs, made_up_times
from worker.build import profiles
from worker.build.profiles import (
    EXACT_MARGIN,
    PROCESS_MARGIN,
    Disturbed,
    Profiler,
    candidates,
    correct_profile,
    ensure_profile,
    estimated_here,
    forget_observations,
    process_base_bytes,
    refresh_memory,
    refresh_profile,
    stored_profile,
)
from worker.build.verify import Specimen, VerificationError
from worker.runtime import Runtime
from worker.sampling.kept_steps import KeptSteps

WORKLOAD = Workload.of(n=4, num_inference_steps=2)


@pytest.fixture
def runtime(settings: Settings) -> Runtime:
    """A worker on a device that nobody has profiled."""
    return Runtime.start(settings)


class Estimating:
    """In place of estimating a device; tells them apart by what a request takes."""

    def __init__(self) -> None:
        self.profiles: list[DeviceProfile] = []

    def __call__(self, family: Family) -> DeviceProfile:
        update = {"request_seconds": float(len(self.profiles))}
        self.profiles.append(made_up_profile(family).model_copy(update=update))
        return self.profiles[-1]


@pytest.fixture
def estimating() -> Estimating:
    return Estimating()


def test_a_device_is_estimated_once(runtime: Runtime, estimating: Estimating) -> None:
    first, again = (ensure_profile(runtime, "tiny", estimating) for _ in range(2))
    assert estimating.profiles == [first]
    assert again == first
    assert runtime.repository.profiled_classes("tiny") == [runtime.device_class]
    assert stored_profile(runtime, "tiny") == first


def test_what_another_worker_was_first_to_store_stays(
    runtime: Runtime, estimating: Estimating, profile: DeviceProfile
) -> None:
    def late(family: Family) -> DeviceProfile:
        keep_profile(runtime.repository, profile)
        return estimating(family)

    assert ensure_profile(runtime, "tiny", late) == stored_profile(runtime, "tiny") == profile


def test_an_estimate_is_of_this_device_and_takes_seconds(runtime: Runtime) -> None:
    estimate = estimated_here(runtime.family("tiny"))
    assert estimate.device_class == runtime.device_class
    assert (estimate.estimated, estimate.memory_estimated) == (True, True)
    assert estimate.process_base_bytes > 100_000_000


@pytest.mark.parametrize(
    "change", [{"torch_version": "1.0"}, {"family_fingerprint": "another"}, {"version": 0}]
)
def test_a_stale_profile_is_estimated_again(
    runtime: Runtime, profile: DeviceProfile, estimating: Estimating, change: dict[str, object]
) -> None:
    keep_profile(runtime.repository, profile.model_copy(update=change))
    assert stored_profile(runtime, "tiny") is None
    fresh = ensure_profile(runtime, "tiny", estimating)
    assert estimating.profiles == [fresh]
    assert stored_profile(runtime, "tiny") == fresh
    assert fresh.torch_version == torch.__version__


def test_a_profile_that_cannot_be_read_is_estimated_again(
    runtime: Runtime, estimating: Estimating
) -> None:
    runtime.repository.change_profile(runtime.device_class, "tiny", lambda _: "{")
    assert ensure_profile(runtime, "tiny", estimating) == estimating.profiles[0]


MEMORY = {
    "process_base_bytes": 77,
    "memory_overhead_bytes": 7,
    "memory_estimated": False,
}


class Refining:
    """A profiler of an estimated device, and steps that an engine measures for it."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.family = runtime, runtime.family("tiny")
        cost = made_up_profile(self.family)
        layers = tuple(each.model_copy(update={"estimated": True}) for each in cost.layers)
        changes = {"layers": layers, "memory_estimated": True}
        self.estimate = cost.model_copy(update=changes)
        keep_profile(runtime.repository, self.estimate)
        self.memory_measured = 0
        self.profiler = Profiler(runtime, self.measure_memory)

    def measure_memory(self, *_: object) -> dict[str, object]:
        self.memory_measured += 1
        return MEMORY

    def measure_steps(self, *computed: torch.dtype) -> None:
        for compute in computed:
            steps = made_up_costs(), made_up_times()
            KeptSteps(self.runtime).keep(self.family, compute, Kernels(), 64, *steps)

    def refined(self) -> DeviceProfile:
        self.profiler.refine("tiny", self.family)
        profile = stored_profile(self.runtime, "tiny")
        assert profile is not None
        return profile


@pytest.fixture
def refining(runtime: Runtime) -> Refining:
    return Refining(runtime)


def test_an_estimate_stays_until_something_is_measured(refining: Refining) -> None:
    assert refining.refined() == refining.estimate
    assert refining.memory_measured == 0


def test_what_the_engine_measures_becomes_the_profile_dtype_by_dtype(refining: Refining) -> None:
    every = list(computes(refining.runtime.device))
    for done, compute in enumerate(every, start=1):
        refining.measure_steps(compute)
        profile = refining.refined()
        assert profile.estimated == (done < len(every))
    assert all(cost.rows == made_up_times().rows for cost in profile.layers)
    assert profile.measured_at > refining.estimate.measured_at


def test_memory_is_measured_once_all_steps_are(refining: Refining) -> None:
    refining.measure_steps(*computes(refining.runtime.device))
    assert refining.refined().memory_estimated
    profile = refining.refined()
    assert {name: getattr(profile, name) for name in MEMORY} == MEMORY
    assert refining.refined() == profile
    assert refining.memory_measured == 1


def test_a_family_that_cannot_be_profiled_is_left_and_others_are_not(
    runtime: Runtime, estimating: Estimating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "LOOK_SECONDS", 0.01)
    runtime.families["other"] = runtime.family("tiny")
    asked = []

    def first_is_wrong(family: Family) -> DeviceProfile:
        asked.append(family)
        if len(asked) == 1:
            raise ValueError("a step of less than no time")
        return estimating(family)

    Profiler(runtime, estimate=first_is_wrong).start()
    wait(lambda: stored_profile(runtime, "other") is not None, 10)
    time.sleep(0.1)
    runtime.stopping.set()
    assert stored_profile(runtime, "tiny") is None
    assert len(asked) == 2


def test_no_memory_is_measured_while_something_is_built(refining: Refining) -> None:
    refining.measure_steps(*computes(refining.runtime.device))
    with refining.runtime.watch.watched():
        for _ in range(3):
            assert refining.refined().memory_estimated


def test_memory_that_cannot_be_measured_stays_a_guess_and_is_not_tried_again(
    refining: Refining, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: object) -> dict[str, object]:
        refining.memory_measured += 1
        raise VerificationError("out of memory")

    profiler = Profiler(refining.runtime, dying)
    monkeypatch.setattr(refining, "profiler", profiler)
    refining.measure_steps(*computes(refining.runtime.device))
    for _ in range(3):
        profile = refining.refined()
    assert profile.process_base_bytes == refining.estimate.process_base_bytes
    assert refining.memory_measured == 1


def test_steps_older_than_the_profile_are_known_already(refining: Refining) -> None:
    refining.measure_steps(*computes(refining.runtime.device))
    later = {"measured_at": datetime.now(UTC) + timedelta(seconds=1)}
    newer = refining.estimate.model_copy(update=later)
    keep_profile(refining.runtime.repository, newer)
    assert refining.refined() == newer


def test_the_profiler_looks_now_and_then_until_the_worker_ends(
    refining: Refining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "LOOK_SECONDS", 0.01)
    looked = threading.Semaphore(0)
    monkeypatch.setattr(refining.profiler, "refine", lambda *_: looked.release())
    refining.profiler.start()
    for _ in range(2):
        assert looked.acquire(timeout=60)
    refining.runtime.stopping.set()
    refining.profiler._thread.join(60)
    assert not refining.profiler._thread.is_alive()


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a profile is made of, without a process of its own or a quiet machine."""
    monkeypatch.setattr(profiles, "measured_memory", lambda *_: MEMORY)
    monkeypatch.setattr(profiles, "Quiet", Undisturbed)


@pytest.mark.usefixtures("_here")
def test_an_operator_can_have_it_measured_now(runtime: Runtime, settings: Settings) -> None:
    runtime.settings = settings.model_copy(update={"profile_seconds": 0.1})
    said: list[tuple[float, str]] = []
    fresh = refresh_profile(runtime, "tiny", lambda *told: said.append(told))
    assert stored_profile(runtime, "tiny") == fresh
    assert (fresh.estimated, fresh.process_base_bytes) == (False, 77)
    assert said[-1] == (1, "done")


@pytest.mark.usefixtures("_here")
def test_memory_alone_is_measured_and_seconds_stay(
    runtime: Runtime, profile: DeviceProfile
) -> None:
    keep_profile(runtime.repository, profile)
    assert refresh_memory(runtime, "tiny") == profile.model_copy(update=MEMORY)
    assert stored_profile(runtime, "tiny") == profile.model_copy(update=MEMORY)


@pytest.mark.usefixtures("_here")
def test_what_was_measured_beside_something_else_is_not_stored(
    runtime: Runtime, profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_profile(runtime.repository, profile)
    monkeypatch.setattr(profiles, "Quiet", lambda device: Undisturbed(device, "other processes"))
    runtime.settings = runtime.settings.model_copy(update={"profile_seconds": 0.1})
    with pytest.raises(Disturbed, match="disturbed by other processes; stop that"):
        refresh_profile(runtime, "tiny")
    assert stored_profile(runtime, "tiny") == profile


def test_what_was_learned_can_be_forgotten(runtime: Runtime, profile: DeviceProfile) -> None:
    with pytest.raises(LookupError, match="tiny has no profile"):
        forget_observations(runtime, "tiny")
    _, measured = missed(runtime, profile, more_bytes=0, times_slower=2)
    learned = profile.corrected(predict(runtime)(profile), measured, 0.5, datetime.now(UTC))
    keep_profile(runtime.repository, learned)
    assert forget_observations(runtime, "tiny") == 1
    assert stored_profile(runtime, "tiny") == profile.unlearned()


@pytest.mark.parametrize(
    ("large", "dtype", "margin"),
    [(False, DType.INT8, PROCESS_MARGIN), (True, DType.FLOAT32, EXACT_MARGIN)],
)
def test_the_process_is_what_a_model_needs_beside_itself(
    large: bool,
    dtype: DType,
    margin: float,
    runtime: Runtime,
    profile: DeviceProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.build.profiles.returns_blocks", lambda *_: large)
    specimens: list[Specimen] = []

    def verify(specimen: Specimen) -> Measurement:
        specimens.append(specimen)
        return Measurement(Cost(10**6, 3 * 10**8, 0.1, 0.1), overhead_bytes=5)

    family = runtime.family("tiny")
    base, overhead = process_base_bytes(family, runtime.directories["tiny"], verify)
    (specimen,) = specimens
    assert (overhead, specimen.overhead) == (5, True)
    assert (specimen.mode, specimen.dtype) == (Mode.FACTORED, dtype)
    assert (specimen.depth, specimen.rank, specimen.own) == (2, 48, None)
    assert specimen.family == runtime.settings.families_dir / "tiny"
    kind = (Mode.FACTORED, dtype)
    (execution,) = (e for e in profile.executions if (e.mode, e.dtype) == kind)
    network = family.manifest.network
    own = memory_bytes(network, 2, 48, execution, Workload.of(1, num_inference_steps=1))
    shared = shared_bytes(network, 48, execution)
    assert base / margin == pytest.approx(3 * 10**8 - int(own) + int(shared), abs=1)


SIZE = Constraints(depth=3, rank=24, mode=Mode.MATERIALISED, dtype=DType.FLOAT32)


def predict(runtime: Runtime) -> Callable[[DeviceProfile], Cost]:
    """Of SIZE."""
    family = runtime.family("tiny")
    return lambda profile: (
        solve(candidates(family, profile, WORKLOAD.n, WORKLOAD.sampling), SIZE).plan.predicted
    )


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
    _, measured = missed(runtime, profile, more_bytes=100, times_slower=4)
    told = correct_profile(
        runtime, runtime.family("tiny"), profile, predict(runtime), measured, 0.001
    )
    corrected = stored_profile(runtime, "tiny")
    assert corrected == told
    (seen,) = corrected.observations
    assert seen.ratio > 3
    assert corrected.memory_overhead_bytes == profile.memory_overhead_bytes + 100
    assert corrected.process_base_bytes == profile.process_base_bytes + 200


def test_what_several_workers_measure_is_learned_once(
    runtime: Runtime, profile: DeviceProfile
) -> None:
    keep_profile(runtime.repository, profile)
    family = runtime.family("tiny")
    _, measured = missed(runtime, profile, more_bytes=100, times_slower=1)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(correct_profile, runtime, family, profile, predict(runtime), measured, None)
    corrected = stored_profile(runtime, "tiny")
    assert corrected is not None
    assert corrected.memory_overhead_bytes == profile.memory_overhead_bytes + 100
    assert corrected.process_base_bytes == profile.process_base_bytes + 200
