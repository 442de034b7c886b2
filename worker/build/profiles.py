"""Device profiles: measured when there is none that fits, corrected by what is built."""

from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from learngenes.config import DType, Mode, Size
from learngenes.family.family import Family
from learngenes.measuring.device import OnProgress, execution_on, measure_profile
from learngenes.measuring.model import Measurement
from learngenes.sizing.budget import Cost, Workload
from learngenes.sizing.cost import memory_bytes, shared_bytes
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import Candidates, Impossible
from worker.build.verify import Specimen, verify
from worker.runtime import Runtime

log = structlog.get_logger()

PROCESS_MARGIN = 1.05
"""Margin for freed memory that the C library's allocator keeps, more or less in each run."""


def measured_here(
    family: Family, directory: Path, max_seconds: float, on_progress: OnProgress
) -> DeviceProfile:
    """Measure a new profile of this device for the family in `directory`."""
    on_progress(0, "a process of its own")
    base = process_base_bytes(family, directory)
    return measure_profile(family, base, max_seconds, on_progress)


Measure = Callable[[Family, Path, float, OnProgress], DeviceProfile]


def ensure_profile(
    runtime: Runtime, family: str, measure: Measure = measured_here
) -> DeviceProfile:
    """Stored profile if it fits this family, device and torch; else a new one."""
    with runtime.device_alone():
        stored = stored_profile(runtime, family)
        return stored or refresh_profile(runtime, family, measure=measure)


def stored_profile(runtime: Runtime, family: str) -> DeviceProfile | None:
    """Stored profile; None where there is none or it is stale."""
    raw = runtime.repository.profile(runtime.device_class, family)
    return _fitting(raw, runtime.family(family))


def _fitting(raw: str | None, family: Family) -> DeviceProfile | None:
    return DeviceProfile.fitting(raw, family.fingerprint, torch.__version__)


def refresh_profile(
    runtime: Runtime,
    family: str,
    on_progress: OnProgress = lambda *_: None,
    measure: Measure = measured_here,
) -> DeviceProfile:
    """Measure a profile and store it."""
    log.info("profiling", family=family, device_class=runtime.device_class)
    seconds = runtime.settings.profile_seconds
    profile = measure(runtime.family(family), runtime.directories[family], seconds, on_progress)
    content = profile.model_dump_json()
    runtime.repository.change_profile(runtime.device_class, family, lambda _: content)
    log.info(
        "profiled",
        family=family,
        p95_ratio=profile.p95_ratio,
        process_base_bytes=profile.process_base_bytes,
    )
    return profile


def process_base_bytes(
    family: Family, directory: Path, verify: Callable[[Specimen], Measurement] = verify
) -> int:
    """Bytes of a process that serves from the family in `directory`, beside its model.

    They are those of a model in few bits, which needs the most room to be made.
    """
    manifest = family.manifest
    size = Size(depth=manifest.sizes.depths[0], rank=manifest.sizes.ranks[-1])
    workload = Workload(n=1, num_inference_steps=1)
    execution = execution_on(family.stem.positions.device, Mode.FACTORED, DType.INT8)
    measured = verify(
        Specimen(
            family=directory,
            depth=size.depth,
            rank=size.rank,
            mode=execution.mode,
            dtype=execution.dtype,
            workload=workload,
            max_seconds=1,
        )
    )
    own = memory_bytes(manifest.network, size.depth, size.rank, execution, workload)
    shared = shared_bytes(manifest.network, size.rank, execution)
    return round(PROCESS_MARGIN * (measured.cost.process_memory_bytes - int(own) + int(shared)))


def candidates(
    family: Family, profile: DeviceProfile, workload: Workload, num_classes: int | None = None
) -> Candidates:
    """Every size of a family on this device; `num_classes`: of a task.

    Raises Impossible when the family is not calibrated.
    """
    manifest = family.manifest
    network = manifest.network.with_classes(num_classes)
    if family.quality is None:
        raise Impossible(f"the family {manifest.name} is not calibrated")
    quality = family.quality if num_classes is None else family.quality.shared_alone
    return Candidates.of(network, manifest.sizes, quality, profile, workload)


def correct_profile(
    runtime: Runtime,
    family: Family,
    known: DeviceProfile,
    predict: Callable[[DeviceProfile], Cost],
    measured: Cost,
) -> DeviceProfile:
    """Profile of the device after it has learned from one measured size.

    It learns from what it says of that size now (`predict`), for it may have learned from the
    same size before; `known` is what it learns from where none is stored any more.
    """
    corrected = known

    def correct(raw: str | None) -> str:
        nonlocal corrected
        profile = _fitting(raw, family) or known
        corrected = profile.corrected(predict(profile), measured)
        return corrected.model_dump_json()

    runtime.repository.change_profile(runtime.device_class, family.manifest.name, correct)
    return corrected
