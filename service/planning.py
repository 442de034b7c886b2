"""Planning: a solution for a budget, or a refusal that says what would fit."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from fineserve.wire import PlanRequest, ProfileResponse
from learngenes.config import NetworkConfig, Sampling, Size, SizeSpace
from learngenes.sizing.budget import Workload
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.quality import QualityTable
from learngenes.sizing.solver import Candidates, Impossible, Infeasible, Solution, solve
from registry import metrics
from registry.queue import BUILD_QUEUE
from registry.records import FamilyRecord, WorkerRecord
from registry.repository import Repository
from service.deps import State
from service.problems import Problem, unavailable
from service.submission import check_limits


class Site(NamedTuple):
    """Family and device that a plan is made for."""

    family: FamilyRecord
    quality: QualityTable
    profile: DeviceProfile


def choose_site(state: State, request: PlanRequest, *, live: bool) -> Site:
    """Family and profile of the device class; `live`: only where a worker builds now."""
    family = choose_family(state, request.family)
    quality = require_calibrated(family)
    profile = _profile(state.repository, family, request.device_class, live=live)
    return Site(family, quality, profile)


def require_calibrated(family: FamilyRecord) -> QualityTable:
    """Quality table of a family. Raises Problem where it has none."""
    if family.quality is None:
        raise Problem(
            422,
            "family-not-calibrated",
            f"the family {family.name} has no quality table, so no size can be called best; "
            f"run `fineserve calibrate` on it and restart its workers",
        )
    return family.quality


def choose_family(state: State, name: str | None) -> FamilyRecord:
    """Family of a name, or the only one or the default one where `name` is None. Raises Problem."""
    if name and (named := state.repository.family(name)):
        return named
    families = {family.name: family for family in state.repository.families()}
    if not families:
        detail = "no worker has announced a family yet; start a worker, or wait for it"
        raise unavailable(detail, "no-family")
    default = state.settings.default_family
    if not name and len(families) > 1 and default in families:
        name = default
    return families[_chosen("family", name, list(families))]


def _chosen(what: str, wanted: str | None, known: Sequence[str]) -> str:
    """The wanted one, or the only one where none is named. Raises Problem."""
    kind, choices = what.replace("_", "-"), ", ".join(known)
    if not wanted and len(known) > 1:
        raise Problem(422, f"{kind}-needed", f"say which {what}: one of {choices}")
    if wanted and wanted not in known:
        raise Problem(422, f"unknown-{kind}", f"no {what} {wanted!r}; choose one of {choices}")
    return wanted or known[0]


def _profile(
    repository: Repository, family: FamilyRecord, wanted: str | None, *, live: bool
) -> DeviceProfile:
    """Profile of the device class. Raises Problem: which class, unknown, none yet, a stale one."""
    torch_versions = {
        worker.device_class: worker.torch_version
        for worker in repository.expected_workers()
        if worker.queue == BUILD_QUEUE and family.name in worker.families
    }
    if live and not torch_versions:
        detail = (
            f"no build worker with the family {family.name} runs now; start one, or wait for it"
        )
        raise unavailable(detail, "no-worker")
    profiled = [] if live else repository.profiled_classes(family.name)
    known = sorted({*torch_versions, *profiled})
    device_class = _chosen("device_class", wanted, known) if known else ""
    raw = repository.profile(device_class, family.name)
    if raw is None:
        raise unavailable(
            f"the device has no profile for {family.name} yet; a build worker estimates one when "
            "it starts, in seconds: retry then",
            "no-profile",
        )
    profile = DeviceProfile.fitting(raw, family.fingerprint, torch_versions.get(device_class))
    if profile is None:
        raise unavailable(
            f"the device's profile for {family.name} is stale: it was measured with another "
            "version of the family, of torch or of fineserve; restart a build worker on that "
            "device, or run `fineserve profile` there",
            "stale-profile",
        )
    return profile


def require_quality(wanted: float, best: float, of: str, field: str) -> None:
    """Raise Problem where no size is as good as is wanted."""
    if wanted > best:
        raise Problem(
            422,
            "infeasible-quality",
            f"{field}={wanted:g} is above {best:.4g}, the best of {of}: ask for less",
            field=field,
            best_quality=best,
        )


def profiles(repository: Repository, families: Sequence[FamilyRecord]) -> list[ProfileResponse]:
    """Profiles of these families, on every class of device."""
    found = []
    for family in families:
        for device_class in repository.profiled_classes(family.name):
            raw = repository.profile(device_class, family.name)
            if profile := DeviceProfile.fitting(raw, family.fingerprint, None):
                found.append(
                    ProfileResponse(
                        family=family.name,
                        device_class=device_class,
                        measured_at=profile.measured_at,
                        estimated=profile.estimated,
                        observations=len(profile.observations),
                        speed_correction=round(profile.speed_correction, 4),
                        overhead_seconds=round(profile.overhead_seconds, 4),
                    )
                )
    return found


def missing_profiles(
    repository: Repository,
    families: Sequence[FamilyRecord],
    workers: Sequence[WorkerRecord],
    default: str,
) -> list[str]:
    """Calibrated families that a running build worker holds and has not profiled yet.

    Only the default one counts where it is among them: the others follow within seconds.
    """
    missing = set()
    if any(family.name == default and family.quality for family in families):
        families = [family for family in families if family.name == default]
    for worker in (worker for worker in workers if worker.queue == BUILD_QUEUE):
        for family in families:
            if family.quality is None or family.name not in worker.families:
                continue
            raw = repository.profile(worker.device_class, family.name)
            if not DeviceProfile.fitting(raw, family.fingerprint, worker.torch_version):
                missing.add(family.name)
    return sorted(missing)


@functools.lru_cache(maxsize=16)
def _candidates(
    network: str, sizes: str, quality: str, profile: str, n: int, samplings: tuple[Sampling, ...]
) -> Candidates:
    """Every size by every sampling, for a while: they outlast many a budget."""
    return Candidates.of(
        NetworkConfig.model_validate_json(network),
        SizeSpace.model_validate_json(sizes),
        QualityTable.model_validate_json(quality),
        DeviceProfile.model_validate_json(profile),
        *(Workload(n, sampling) for sampling in samplings),
    )


def require_guide(guide: Size | None, family: FamilyRecord, num_classes: int | None) -> None:
    """Raise Problem unless this size of a family can guide a model, of `num_classes` of a task."""
    if guide is None:
        return
    if num_classes is not None:
        detail = "the model has classes of its own, which no other size knows: leave guide out"
        raise Problem(422, "unsuitable-guide", detail)
    sizes = family.sizes
    if guide.depth not in sizes.depths or guide.rank not in sizes.ranks:
        depths, ranks = (", ".join(map(str, values)) for values in (sizes.depths, sizes.ranks))
        raise Problem(
            422,
            "unsuitable-guide",
            f"the family {family.name} has no size of {guide} that could guide; its depths are "
            f"{depths}, its ranks {ranks}",
        )


def solve_budget(
    state: State, request: PlanRequest, site: Site, num_classes: int | None = None
) -> Solution:
    """Best size for a budget and a task of `num_classes`, by default the family's own.

    Raises Problem: over the limits, contradictory, infeasible.
    """
    quality, samplings = site.quality.choices(request, num_classes)
    check_limits(state.settings, request.n, samplings[0].num_inference_steps)
    require_guide(request.guide, site.family, num_classes)
    candidates = _candidates(
        site.family.network.with_classes(num_classes).model_dump_json(),
        site.family.sizes.model_dump_json(),
        quality.model_dump_json(),
        site.profile.model_dump_json(),
        request.n,
        samplings,
    )
    try:
        solution = solve(candidates, request.constraints)
    except Impossible as error:
        metrics.PLANS.labels("impossible").inc()
        raise Problem(422, "contradictory-constraints", str(error)) from error
    except Infeasible as error:
        metrics.PLANS.labels("infeasible").inc()
        raise Problem(
            422,
            "infeasible-budget",
            f"{error}; send that, or lower n or num_inference_steps",
            binding=error.binding,
            nearest_feasible={**error.budget, "plan": error.nearest},
        ) from error
    metrics.PLANS.labels("solved").inc()
    return solution
