"""What is sized: the shipped family, and one with the shapes of DiT-XL/2; each with its profile."""

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.deployment import FAMILIES
from benchmarks.parts import REPOSITORY, say
from learngenes.config import Size
from learngenes.data.images import as_picture, encode_png
from learngenes.device import capacity_bytes, default_device, with_threads
from learngenes.family.family import Family, load_family
from learngenes.family.synthetic import write_synthetic_family
from learngenes.measuring.device import measure_profile
from learngenes.sizing.budget import Cost, Plan, Workload
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import Candidates
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.weights import kept
from worker.build.profiles import process_base_bytes
from worker.build.verify import Specimen, verify
from worker.sampling.engine import Engine
from worker.sampling.jobs import SampleRequest

LEAST_RUNS, MOST_RUNS = 5, 100
DIT_XL = REPOSITORY / "var" / "benchmarks" / "families" / "dit-xl-2"


@dataclass
class Subject:
    """A family on this device, as a build worker knows it."""

    directory: Path
    family: Family
    profile: DeviceProfile

    @functools.cached_property
    def engine(self) -> Engine:
        """Uncompiled, like the profile: a benchmark waits for no compiler."""
        engine = Engine([self.family], capacity_bytes(default_device()))
        engine.start()
        return engine

    @property
    def name(self) -> str:
        return self.family.manifest.name

    def candidates(self, workload: Workload) -> Candidates:
        manifest, quality = self.family.manifest, self.family.quality
        assert quality is not None
        return Candidates.of(manifest.network, manifest.sizes, quality, self.profile, workload)

    def specimen(self, plan: Plan, workload: Workload) -> Specimen:
        """What a build worker measures of a plan before its model is ready."""
        return Specimen(
            family=self.directory,
            depth=plan.depth,
            rank=plan.rank,
            mode=plan.mode,
            dtype=plan.dtype,
            workload=workload,
        )

    def measure(self, plan: Plan, workload: Workload, max_seconds: float) -> Cost:
        """Memory of a plan in a fresh process, seconds of the engine that serves."""
        seconds: list[float] = []
        self._seconds(plan, workload)
        while len(seconds) < LEAST_RUNS or (
            len(seconds) < MOST_RUNS and sum(seconds) < max_seconds
        ):
            seconds.append(self._seconds(plan, workload))
        return dataclasses.replace(
            verify(self.specimen(plan, workload)).cost,
            latency_seconds=float(np.median(seconds)),
            latency_p95_seconds=float(np.quantile(seconds, 0.95)),
        )

    def _seconds(self, plan: Plan, workload: Workload) -> float:
        size = Size(depth=plan.depth, rank=plan.rank)
        own = self.family.own_of(size, plan.mode, plan.dtype)
        request = SampleRequest(
            family=self.family,
            model=describe(plan),
            artifact="own",
            depth=plan.depth,
            rank=plan.rank,
            mode=plan.mode,
            dtype=plan.dtype,
            load=lambda: kept(own, self.family, plan.mode, plan.dtype),
            class_labels=[i % len(self.family.manifest.class_names) for i in range(workload.n)],
            seeds=range(workload.n),
            sampling=workload.sampling,
        )
        began = time.perf_counter()
        job = self.engine.submit(request)
        job.wait()
        for image in job.images():
            encode_png(as_picture(image))
        return time.perf_counter() - began


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
    lanes = Lanes.of(default_device())
    base, _ = process_base_bytes(family, directory)
    with with_threads(lanes.threads):
        profile = measure_profile(
            family, base, max_seconds=30, kernels_of=lambda _: Kernels(lanes=lanes)
        )
    profile = profile.model_copy(update={"request_seconds": 0.0})  # there is no queue here
    say(f"{family.manifest.name}: profiled, p95 ratio {profile.p95_ratio:.2f}")
    return Subject(directory, family, profile)


def describe(plan: Plan) -> str:
    return f"L{plan.depth} r{plan.rank} {plan.mode} {plan.dtype}"
