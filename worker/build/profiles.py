"""Device profiles: estimated at once, measured by the engine that serves, corrected by builds."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog
import torch
from redis import RedisError

from learngenes.config import DType, Mode, Sampling, SamplingRequest, Size
from learngenes.device import process_peak_bytes, returns_blocks, with_threads
from learngenes.family.family import Family
from learngenes.measuring.device import (
    OnProgress,
    computes,
    estimate_profile,
    measure_profile,
    with_times,
)
from learngenes.measuring.model import Measurement
from learngenes.measuring.quiet import Quiet
from learngenes.measuring.steps import execution_on
from learngenes.sizing.budget import Cost, Workload
from learngenes.sizing.cost import memory_bytes, shared_bytes
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import Candidates, Impossible
from learngenes.stepping.kernels import CompiledGraphs, Kernels, graphs
from learngenes.stepping.lanes import Lanes
from worker.build.verify import Specimen, VerificationError, verify
from worker.leases import Stopping
from worker.runtime import Runtime
from worker.sampling.kept_steps import measured_steps

log = structlog.get_logger()

ESTIMATE_SECONDS = 1.0
"""Seconds, about, in which a device is estimated for a family that is new to it."""
PROCESS_MARGIN, EXACT_MARGIN = 1.05, 1.01
"""Margin for freed memory that the C library's allocator keeps, more or less in each run; and that
of a large network, of which it keeps next to none."""
ESTIMATE_MARGIN = 1.4
"""The same of a process that has only begun, and has not all of its libraries yet."""
LOOK_SECONDS = 5.0


class Disturbed(Exception):
    """Something else used the device while it was measured; the message says what to do."""


def estimated_here(family: Family) -> DeviceProfile:
    """Estimate of this device, by a process that has what a serving one has."""
    base = round(ESTIMATE_MARGIN * process_peak_bytes(family.stem.positions.device))
    return estimate_profile(family, base, ESTIMATE_SECONDS)


def ensure_profile(
    runtime: Runtime, family: str, estimate: Callable[[Family], DeviceProfile] = estimated_here
) -> DeviceProfile:
    """Stored profile if it fits this family, device and torch; else an estimate, stored."""
    if stored := stored_profile(runtime, family):
        return stored
    profile = estimate(runtime.family(family))

    def unless_measured(raw: str | None) -> str:
        nonlocal profile  # another worker may have been first
        profile = _fitting(raw, runtime.family(family)) or profile
        return profile.model_dump_json()

    runtime.repository.change_profile(runtime.device_class, family, unless_measured)
    log.info("device estimated", family=family, device_class=runtime.device_class)
    return profile


def stored_profile(runtime: Runtime, family: str) -> DeviceProfile | None:
    """Stored profile; None where there is none or it is stale."""
    raw = runtime.repository.profile(runtime.device_class, family)
    return _fitting(raw, runtime.family(family))


def _fitting(raw: str | None, family: Family) -> DeviceProfile | None:
    return DeviceProfile.fitting(raw, family.fingerprint, torch.__version__)


def refresh_profile(
    runtime: Runtime, family: str, on_progress: OnProgress = lambda *_: None
) -> DeviceProfile:
    """Measure this device in this process, by compiled kernels where there are some, and keep it.

    Waits until nobody else measures. Raises Disturbed.
    """
    with runtime.device_alone():
        on_progress(0, "a process of its own")
        loaded = runtime.family(family)
        measured = measured_memory(loaded, runtime.directories[family])
        lanes = Lanes.of(runtime.device)
        compiled = CompiledGraphs(runtime.settings.resolved_kernels_dir)

        def kernels_of(dtype: DType) -> Kernels:
            wanted = graphs(loaded.manifest.network, dtype)
            return (
                Kernels(lanes=lanes) if compiled.missing(wanted) else compiled.load(wanted, lanes)
            )

        seconds, quiet = runtime.settings.profile_seconds, Quiet(runtime.device)
        with with_threads(lanes.threads):
            profile = measure_profile(loaded, 0, seconds, on_progress, kernels_of, 0)
        lanes.close()
        if by := quiet.disturbed_by():
            raise Disturbed(f"measuring was disturbed by {by}; stop that, or try again later")
    profile = profile.model_copy(update=measured)
    content = profile.model_dump_json()
    runtime.repository.change_profile(runtime.device_class, family, lambda _: content)
    return profile


def refresh_memory(runtime: Runtime, family: str) -> DeviceProfile:
    """Measure what a process of this family needs, in one of its own, and keep it.

    What else the machine does makes no difference to it.
    """
    with runtime.device_alone():
        measured = measured_memory(runtime.family(family), runtime.directories[family])
    profile = ensure_profile(runtime, family)

    def with_memory(raw: str | None) -> str:
        nonlocal profile
        profile = (_fitting(raw, runtime.family(family)) or profile).model_copy(update=measured)
        return profile.model_dump_json()

    runtime.repository.change_profile(runtime.device_class, family, with_memory)
    return profile


def forget_observations(runtime: Runtime, family: str) -> int:
    """Take back all that a profile has learned of latency; returns of how many models."""
    before = 0

    def forget(raw: str | None) -> str:
        nonlocal before
        profile = _fitting(raw, runtime.family(family))
        if profile is None:
            raise LookupError(f"{family} has no profile on {runtime.device_class} yet")
        before = len(profile.observations)
        return profile.unlearned().model_dump_json()

    runtime.repository.change_profile(runtime.device_class, family, forget)
    return before


class Profiler:
    """Thread of a build worker that makes measurements of estimates, when there are some.

    Steps are measured by the engine of a sampling worker, what a process needs in one of its own.
    """

    def __init__(
        self,
        runtime: Runtime,
        measure_memory: Callable[[Family, Path], dict[str, object]] | None = None,
        estimate: Callable[[Family], DeviceProfile] = estimated_here,
    ) -> None:
        self._runtime, self._measure_memory = runtime, measure_memory or measured_memory
        self._estimate = estimate
        self._thread = threading.Thread(target=self._run, name="profiler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        failed = set[tuple[str, str]]()
        while not self._runtime.stopping.wait(LOOK_SECONDS):
            for name, family in self._runtime.families.items():
                if (name, family.fingerprint) in failed:
                    continue
                try:
                    self.refine(name, family)
                except (Stopping, RedisError):  # both will be back
                    continue
                except Exception:  # of one family, which is no reason to leave the others
                    failed.add((name, family.fingerprint))
                    log.exception("a family cannot be profiled until the next start", family=name)

    def refine(self, name: str, family: Family) -> None:
        """Take over what was measured since a family's profile was; estimate what has none."""
        if family.quality is None:  # nothing can be planned for it
            return
        profile = ensure_profile(self._runtime, name, self._estimate)
        times = {}
        for compute in computes(self._runtime.device):
            known = measured_steps(
                self._runtime.repository, self._runtime.device_class, family, compute
            )
            if known and known.measured_at > profile.measured_at:
                times[compute] = known.times
        memory = {}
        if profile.memory_estimated and not profile.estimated and self._runtime.watch.resting:
            memory = self._memory(name, family)
        if not times and not memory:
            return

        def refined(raw: str | None) -> str:
            present = _fitting(raw, family) or profile
            if times:
                present = with_times(present, family, times)
            return present.model_copy(update=memory).model_dump_json()

        self._runtime.repository.change_profile(self._runtime.device_class, name, refined)
        log.info("profiled", family=name, computes=[str(c) for c in times], **memory)

    def _memory(self, name: str, family: Family) -> dict[str, object]:
        try:
            with self._runtime.device_first() as first:
                return (
                    self._measure_memory(family, self._runtime.directories[name]) if first else {}
                )
        except VerificationError as error:  # the guess stays, which is on the safe side
            log.warning("the memory of a process cannot be measured", reason=str(error))
            return {"memory_estimated": False}


def measured_memory(family: Family, directory: Path) -> dict[str, object]:
    """Fields of a profile about memory, measured in a process of its own."""
    base, overhead = process_base_bytes(family, directory)
    return {
        "process_base_bytes": base,
        "memory_overhead_bytes": overhead,
        "memory_estimated": False,
    }


def process_base_bytes(
    family: Family, directory: Path, verify: Callable[[Specimen], Measurement] = verify
) -> tuple[int, int]:
    """Bytes of a process that serves from the family in `directory`, beside its model; and those
    of the allocator that a batch needs beyond the prediction.

    The former are those of a model in few bits, which needs the most room to be made; of a large
    network, where that can be foreseen, those of one in float32.
    """
    manifest, device = family.manifest, family.stem.positions.device
    exact = returns_blocks(device, manifest.network.hidden_states_bytes)
    size = Size(depth=manifest.sizes.depths[0], rank=manifest.sizes.ranks[-1])
    workload = Workload.of(n=1, num_inference_steps=1)
    execution = execution_on(device, Mode.FACTORED, DType.FLOAT32 if exact else DType.INT8)
    measured = verify(
        Specimen(
            family=directory,
            depth=size.depth,
            rank=size.rank,
            mode=execution.mode,
            dtype=execution.dtype,
            workload=workload,
            overhead=True,
        )
    )
    own = memory_bytes(manifest.network, size.depth, size.rank, execution, workload)
    shared = shared_bytes(manifest.network, size.rank, execution)
    process = measured.cost.process_memory_bytes - int(own) + int(shared)
    return round((EXACT_MARGIN if exact else PROCESS_MARGIN) * process), measured.overhead_bytes


def candidates(
    family: Family,
    profile: DeviceProfile,
    n: int,
    asked: SamplingRequest | Sampling,
    num_classes: int | None = None,
) -> Candidates:
    """Every size of a family on this device, for what was asked for; `num_classes`: of a task.

    Raises Impossible when the family is not calibrated.
    """
    manifest = family.manifest
    network = manifest.network.with_classes(num_classes)
    if family.quality is None:
        raise Impossible(f"the family {manifest.name} is not calibrated")
    request = SamplingRequest() if isinstance(asked, Sampling) else asked
    quality, samplings = family.quality.choices(request, num_classes)
    if isinstance(asked, Sampling):
        samplings = (asked,)
    workloads = (Workload(n, sampling) for sampling in samplings)
    return Candidates.of(network, manifest.sizes, quality, profile, *workloads)


def correct_profile(
    runtime: Runtime,
    family: Family,
    known: DeviceProfile,
    predict: Callable[[DeviceProfile], Cost],
    measured: Cost,
    overhead_seconds: float | None,
) -> DeviceProfile:
    """Profile of the device after it has learned from one measured size.

    `overhead_seconds` as in `DeviceProfile.corrected`.

    It learns from what it says of that size now (`predict`), for it may have learned from the
    same size before; `known` is what it learns from where none is stored any more.
    """
    corrected = known

    def correct(raw: str | None) -> str:
        nonlocal corrected
        profile = _fitting(raw, family) or known
        corrected = profile.corrected(
            predict(profile), measured, overhead_seconds, datetime.now(UTC)
        )
        return corrected.model_dump_json()

    runtime.repository.change_profile(runtime.device_class, family.manifest.name, correct)
    return corrected
