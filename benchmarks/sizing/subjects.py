"""What is sized: the shipped family, and one with the shapes of DiT-XL/2; each with its profile."""

import functools
from dataclasses import dataclass
from pathlib import Path

from benchmarks.deployment import FAMILIES
from benchmarks.parts import REPOSITORY, say
from learngenes.device import default_device
from learngenes.family.family import Family, load_family
from learngenes.family.synthetic import write_synthetic_family
from learngenes.measuring.device import measure_profile
from learngenes.measuring.model import Measurement
from learngenes.sizing.budget import Plan, Workload
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import Candidates
from worker.build.profiles import process_base_bytes
from worker.build.verify import Specimen, verify

DIT_XL = REPOSITORY / "var" / "benchmarks" / "families" / "dit-xl-2"


@dataclass
class Subject:
    """A family on this device, as a build worker knows it."""

    directory: Path
    family: Family
    profile: DeviceProfile

    @property
    def name(self) -> str:
        return self.family.manifest.name

    def candidates(self, workload: Workload) -> Candidates:
        manifest, quality = self.family.manifest, self.family.quality
        assert quality is not None
        return Candidates.of(manifest.network, manifest.sizes, quality, self.profile, workload)

    def specimen(self, plan: Plan, workload: Workload, max_seconds: float) -> Specimen:
        """What a build worker measures of a plan before its model is ready."""
        return Specimen(
            family=self.directory,
            depth=plan.depth,
            rank=plan.rank,
            mode=plan.mode,
            dtype=plan.dtype,
            workload=workload,
            max_seconds=max_seconds,
        )

    def measure(self, plan: Plan, workload: Workload, max_seconds: float) -> Measurement:
        """Measure a plan in a fresh process."""
        return verify(self.specimen(plan, workload, max_seconds))


@functools.cache
def fashion() -> Subject:
    return _profiled(FAMILIES / "fashion")


@functools.cache
def dit_xl() -> Subject:
    if not DIT_XL.exists():
        write_synthetic_family(DIT_XL)
    return _profiled(DIT_XL)


def _profiled(directory: Path) -> Subject:
    family = load_family(directory).to(default_device())
    profile = measure_profile(family, process_base_bytes(family, directory), max_seconds=30)
    say(f"{family.manifest.name}: profiled, p95 ratio {profile.p95_ratio:.2f}")
    return Subject(directory, family, profile)


def describe(plan: Plan) -> str:
    return f"L{plan.depth} r{plan.rank} {plan.mode} {plan.dtype}"
