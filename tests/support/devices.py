"""This device with a profile that nobody measured."""

import torch

from learngenes.device import default_device, device_class, native_bfloat16, packing_threads
from learngenes.family.family import Family
from learngenes.sizing.budget import Budget, Plan, Workload
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import Candidates, solve
from registry.records import WorkerRecord
from registry.repository import Repository
from tests.support.sizing import device_profile
from worker.runtime import Runtime


def made_up_profile(family: Family) -> DeviceProfile:
    """Profile that fits this device, this torch and the family."""
    device = default_device()
    return device_profile(
        family.manifest.network,
        family.manifest.sizes,
        device_class=device_class(device),
        torch_version=torch.__version__,
        family=family.manifest.name,
        family_fingerprint=family.fingerprint,
        native_bfloat16=native_bfloat16(device),
        packing_threads=packing_threads(device),
    )


def keep_profile(repository: Repository, profile: DeviceProfile) -> None:
    """Store a profile as the worker that has measured it does."""
    content = profile.model_dump_json()
    repository.change_profile(profile.device_class, profile.family, lambda _: content)


def beat(runtime: Runtime, seconds: float = 60, **changes: object) -> None:
    """Announce a build worker of the family `tiny` on this device, or one with `changes`."""
    worker = {
        "id": "a-worker",
        "queue": "build",
        "device_class": runtime.device_class,
        "torch_version": torch.__version__,
        "families": ["tiny"],
    }
    runtime.repository.heartbeat(WorkerRecord.model_validate(worker | changes), seconds)


def planned(family: Family, profile: DeviceProfile, budget: Budget) -> Plan:
    """Plan that the service makes of a budget."""
    manifest = family.manifest
    assert family.quality is not None
    workloads = (Workload(budget.n, sampling) for sampling in family.quality.samplings(budget))
    candidates = Candidates.of(
        manifest.network, manifest.sizes, family.quality, profile, *workloads
    )
    return solve(candidates, budget.constraints).plan
