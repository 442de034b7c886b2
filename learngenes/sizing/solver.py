"""The solver: from a budget to the best of all sizes that keep it."""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learngenes.config import Mode, NetworkConfig, Sampling, Size, SizeSpace, executable
from learngenes.sizing.budget import (
    BudgetName,
    Constraints,
    Cost,
    LatencyPercentile,
    MemoryScope,
    Plan,
    Slack,
    Workload,
)
from learngenes.sizing.cost import (
    Execution,
    Ints,
    activation_bytes,
    guide_bytes,
    loading_bytes,
    making_bytes,
    process_bytes,
    shared_bytes,
    weight_bytes,
)
from learngenes.sizing.profile import ESTIMATE_RATIO, MEASURED_RATIO, DeviceProfile
from learngenes.sizing.quality import Floats, QualityTable

Bools = NDArray[np.bool_]

FIXED = {"mem_scope", "depth", "rank", "mode", "dtype"}
"""Constraints that a front depends on."""
MOST_FRONTS = 16
FRONT_PART = 256
"""Candidates that are looked at together for the front."""


@dataclass(frozen=True, slots=True)
class Solution:
    plan: Plan
    binding: tuple[BudgetName, ...]
    """Constraints without which a better plan would exist; none for the family's best."""
    slack: Slack
    front: tuple[Plan, ...]
    """Sizes that no other beats in quality, memory (of the stated scope) and latency at once."""


class Impossible(ValueError):
    """The fixed values contradict each other or the family."""


class Infeasible(ValueError):
    """No size fits the budget."""

    def __init__(
        self, binding: tuple[BudgetName, ...], nearest: Plan, budget: dict[BudgetName, float]
    ) -> None:
        self.binding, self.nearest, self.budget = binding, nearest, budget
        """A budget that `nearest` keeps: what was sent, relaxed where it binds."""
        relaxed = ", ".join(f"{name} {budget[name]:.12g}" for name in binding)
        super().__init__(
            f"no size fits; the nearest (depth {nearest.depth}, rank {nearest.rank}, "
            f"{nearest.mode}, {nearest.dtype}, n={nearest.n}) needs {relaxed}"
        )


@dataclass(frozen=True)
class Candidates:
    """Every size in every execution by every sampling, as columns."""

    n: int
    samplings: tuple[Sampling, ...]
    executions: tuple[Execution, ...]
    estimated: tuple[bool, ...]
    """For each execution, whether its latency is an estimate."""
    sampling: Ints
    execution: Ints
    depth: Ints
    rank: Ints
    memory: Ints
    process: Ints
    latency: Floats
    p95: Floats
    """One multiple of all medians: both order sizes alike."""
    quality: Floats
    distance: Floats
    """Distance of the pictures to real ones; NaN where quality is by loss."""
    accuracy: Floats
    _orders: dict[MemoryScope, Ints] = field(default_factory=dict, repr=False)
    _fronts: dict[Constraints, tuple[Plan, ...]] = field(default_factory=dict, repr=False)
    """Fronts that were found, by what was fixed."""

    @classmethod
    def of(
        cls,
        network: NetworkConfig,
        sizes: SizeSpace,
        quality: QualityTable,
        profile: DeviceProfile,
        *workloads: Workload,
    ) -> "Candidates":
        """Candidates for workloads that differ in their sampling."""
        samplings = tuple(workload.sampling for workload in workloads)
        grid = [a.ravel() for a in np.meshgrid(sizes.depths, sizes.ranks, indexing="ij")]
        imported = np.array([depth for depth in sizes.depths if quality.imported], dtype=np.int64)
        dense = imported, np.full_like(imported, network.width)
        executions = tuple(profile.executions)
        worths = _Worths(quality, samplings, executions, grid, imported)
        n = workloads[0].n
        rows, row = np.unique([workload.rows for workload in workloads], return_inverse=True)
        guides = [workload.guide for workload in workloads]
        sizes_of: list[tuple[Ints, ...]] = []
        of_sampling: list[tuple[NDArray[Any], ...]] = []
        for index, execution in enumerate(executions):
            depths, ranks = dense if execution.mode is Mode.DENSE else grid
            own = weight_bytes(network, depths, ranks, execution) + profile.memory_overhead_bytes
            active = activation_bytes(network, ranks, execution, n, rows[:, None])
            of_guide = functools.cache(functools.partial(guide_bytes, network, execution))
            guiding = np.array([[of_guide(guide)] for guide in guides])
            needed = own + guiding + np.broadcast_to(active, (len(rows), len(ranks)))[row]
            made = own + making_bytes(network, ranks, execution)  # until then nothing is active
            shared = shared_bytes(network, ranks, execution)
            shared = shared - loading_bytes(network, depths, execution)
            held = np.maximum(needed, made)
            process = np.asarray(process_bytes(held, shared, profile.process_base_bytes))
            seconds = profile.latencies(depths, ranks, execution, workloads)
            sizes_of.append((np.full_like(depths, index), depths, ranks))
            of_sampling.append((needed, process, seconds, *worths.of(execution)))
        memory, process, latency, worth, distance, accuracy = (
            np.concatenate(column, axis=1).ravel() for column in zip(*of_sampling, strict=True)
        )
        which, depth, rank = (
            np.tile(np.concatenate(column), len(workloads))
            for column in zip(*sizes_of, strict=True)
        )
        by = np.repeat(np.arange(len(workloads)), len(memory) // len(workloads))
        return cls(
            n=n,
            samplings=samplings,
            executions=executions,
            estimated=tuple(map(profile.latency_estimated, executions)),
            sampling=by,
            execution=which,
            depth=depth,
            rank=rank,
            memory=memory,
            process=process,
            latency=latency,
            p95=latency * profile.p95_ratio,
            quality=worth,
            distance=distance,
            accuracy=accuracy,
        )

    def scoped_memory(self, scope: MemoryScope) -> Ints:
        return self.process if scope == "process" else self.memory

    def percentile(self, percentile: LatencyPercentile) -> Floats:
        """Seconds that so many of 100 batches keep."""
        return self.latency if percentile == 50 else self.p95

    def order(self, scope: MemoryScope) -> Ints:
        """Indices of all: the best first, then the quickest, then the smallest."""
        if scope not in self._orders:
            keys = (self.scoped_memory(scope), self.p95, -self.quality)
            self._orders[scope] = np.lexsort(keys)
        return self._orders[scope]

    def front(self, constraints: Constraints) -> tuple[Plan, ...]:
        """What nothing dominates of what is allowed, best first. Raises Impossible."""
        fixed = Constraints(**constraints.model_dump(include=FIXED))
        if fixed not in self._fronts:
            if len(self._fronts) >= MOST_FRONTS:
                self._fronts.clear()
            order = self.order(fixed.mem_scope)
            among = order[_allowed(self, fixed)[order]]
            memory = self.scoped_memory(fixed.mem_scope)
            self._fronts[fixed] = tuple(self.plans(_front(self, memory, among)))
        return self._fronts[fixed]

    def predicted(self, plan: Plan) -> Cost:
        """What exactly this plan costs. Raises KeyError where it is none of these."""
        kinds = [(each.mode, each.dtype) for each in self.executions]
        if (plan.mode, plan.dtype) not in kinds or plan.workload.sampling not in self.samplings:
            raise KeyError(f"no candidate is {plan}")
        found = _all(
            [
                self.depth == plan.depth,
                self.rank == plan.rank,
                self.execution == kinds.index((plan.mode, plan.dtype)),
                self.sampling == self.samplings.index(plan.workload.sampling),
            ]
        )
        return self.plans(np.flatnonzero(found).tolist())[0].predicted

    def plans(self, indices: list[int]) -> list[Plan]:
        columns = (
            *(self.sampling, self.execution, self.depth, self.rank, self.memory, self.process),
            *(self.latency, self.p95, self.quality, self.distance, self.accuracy),
        )
        return [
            self._plan(*values)
            for values in zip(*(column[indices].tolist() for column in columns), strict=True)
        ]

    def _plan(
        self,
        by: int,
        execution: int,
        depth: int,
        rank: int,
        memory: int,
        process: int,
        latency: float,
        p95: float,
        quality: float,
        distance: float,
        accuracy: float,
    ) -> Plan:
        estimated = self.estimated[execution]
        return Plan(
            depth=depth,
            rank=rank,
            mode=self.executions[execution].mode,
            dtype=self.executions[execution].dtype,
            n=self.n,
            predicted=Cost(memory, process, latency, p95),
            quality=quality,
            latency_estimated=estimated,
            latency_range_seconds=_range(latency, estimated=estimated),
            sampling=self.samplings[by],
            distance=None if math.isnan(distance) else distance,
            class_accuracy=None if math.isnan(accuracy) else accuracy,
        )


class _Worths:
    """Quality, distance and class accuracy of sizes by samplings, (S, N) each."""

    def __init__(
        self,
        table: QualityTable,
        samplings: Sequence[Sampling],
        executions: Sequence[Execution],
        grid: Sequence[Ints],
        imported: Ints,
    ) -> None:
        self._table, self._samplings = table, samplings
        depths, ranks = grid
        self._shared = table.losses(depths, ranks) if table.depths else np.full(len(depths), np.inf)
        self._imported = table.imported_losses(imported) if len(imported) else np.zeros(0)
        self._pictures = table.distances(samplings, depths, ranks)
        self._of_loss = [table.pictures_of_loss(s) for s in samplings if self._pictures]
        self._farther = self._by_rounding({self._ratio(e) for e in executions})
        self._guided = np.array(
            [
                _is_larger(depths, ranks, sampling.guide if sampling.guided else None)
                for sampling in samplings
            ]
        )
        self._alone = np.array([[s.guide is None or not s.guided] for s in samplings])

    def of(self, execution: Execution) -> tuple[Floats, Floats, Floats]:
        """Of an execution; quality is 0 where nobody knows it, or where a guide is no smaller."""
        table, dense = self._table, execution.mode is Mode.DENSE
        ratio = self._ratio(execution)
        losses = ratio * (self._imported if dense else self._shared)
        guided = self._alone if dense else self._guided  # no imported layers guide others
        unknown = np.full((len(self._samplings), len(losses)), np.nan)
        if self._pictures is None or not np.isfinite(losses).all():
            return guided * table.qualities(losses), unknown, unknown
        if dense:
            distances, accuracies = (
                np.array([np.interp(losses, curve[0], curve[i]) for curve in self._of_loss])
                for i in (1, 2)
            )
            return guided * table.picture_qualities(distances, accuracies), distances, unknown
        distances, accuracies = self._pictures
        distances = distances + self._farther[ratio]
        return guided * table.picture_qualities(distances, accuracies), distances, accuracies

    def _ratio(self, execution: Execution) -> float:
        return max(1.0, self._table.loss_ratio(execution.mode, execution.dtype))

    def _by_rounding(self, ratios: set[float]) -> dict[float, Floats]:
        """Distance (S, N) that rounding adds to sizes that share U and V, by its ratio of loss."""
        if not self._of_loss or not np.isfinite(self._shared).all():
            return {}
        known = sorted(ratios - {math.inf})
        losses = np.multiply.outer([1.0, *known], self._shared)
        distances = np.array([np.interp(losses, *curve[:2]) for curve in self._of_loss])
        added = np.moveaxis(distances[:, 1:] - distances[:, :1], 1, 0)
        return dict(zip(known, added, strict=True))


def _is_larger(depths: Ints, ranks: Ints, guide: Size | None) -> Bools:
    """Whether sizes are larger than the one that guides; all are where none does."""
    if guide is None:
        return np.ones(len(depths), dtype=bool)
    no_smaller = (depths >= guide.depth) & (ranks >= guide.rank)
    return no_smaller & ((depths > guide.depth) | (ranks > guide.rank))


def _range(seconds: float, *, estimated: bool) -> tuple[float, float]:
    ratio = ESTIMATE_RATIO if estimated else MEASURED_RATIO
    return seconds / ratio, seconds * ratio


def solve(candidates: Candidates, constraints: Constraints) -> Solution:
    """The feasible size of highest predicted quality; among equals the one of lower latency.

    Exhaustive: no enumerated size that keeps the constraints is better. Raises Impossible,
    or Infeasible with the nearest plan and the budget that it would keep.
    """
    allowed = _allowed(candidates, constraints)
    kept = _kept(candidates, constraints)
    feasible = _all([allowed, *kept.values()])
    if not feasible.any():
        raise _infeasible(candidates, constraints, allowed, kept)
    memory = candidates.scoped_memory(constraints.mem_scope)
    order = candidates.order(constraints.mem_scope)
    best = int(order[np.argmax(feasible[order])])
    mem, latency = constraints.max_mem_bytes, constraints.max_latency_seconds
    seconds = candidates.percentile(constraints.latency_percentile)
    return Solution(
        plan=candidates.plans([best])[0],
        binding=_binding(candidates, allowed, kept, best),
        slack=Slack(
            memory_bytes=None if mem is None else int(mem - memory[best]),
            latency_seconds=None if latency is None else float(latency - seconds[best]),
        ),
        front=candidates.front(constraints),
    )


def _allowed(candidates: Candidates, constraints: Constraints) -> Bools:
    """Candidates with the fixed depth, rank, mode and dtype. Raises Impossible."""
    mode, dtype = constraints.mode, constraints.dtype
    if mode and dtype and not executable(mode, dtype):
        raise Impossible(
            f"dtype {dtype} is for mode factored: a weight that is written out would be too "
            "coarse; choose int4, or leave mode out"
        )
    modes, dtypes = (
        np.array([getattr(e, name) for e in candidates.executions])[candidates.execution]
        for name in ("mode", "dtype")
    )
    allowed = candidates.quality > 0
    for name, column, wanted in (
        ("depth", candidates.depth, constraints.depth),
        ("rank", candidates.rank, constraints.rank),
        ("mode", modes, mode),
        ("dtype", dtypes, dtype),
    ):
        if wanted is None:
            continue
        if not (column == wanted).any():
            choices = ", ".join(map(str, sorted(set(column.tolist()))))
            raise Impossible(f"the family has no {name} {wanted}; choose one of {choices}")
        allowed &= column == wanted
    if not allowed.any():
        raise Impossible(
            "what is fixed excludes every size that the quality table knows; fix less, "
            "or calibrate the family for that dtype"
        )
    return allowed


def _kept(candidates: Candidates, constraints: Constraints) -> dict[BudgetName, Bools]:
    """For each budget that was given, the candidates that keep it."""
    kept: dict[BudgetName, Bools] = {}
    if constraints.max_mem_bytes is not None:
        memory = candidates.scoped_memory(constraints.mem_scope)
        kept["max_mem_gb"] = memory <= constraints.max_mem_bytes
    if constraints.max_latency_seconds is not None:
        seconds = candidates.percentile(constraints.latency_percentile)
        kept["max_latency_ms"] = seconds <= constraints.max_latency_seconds
    if constraints.min_quality is not None:
        kept["min_quality"] = candidates.quality >= constraints.min_quality
    return kept


def _binding(
    candidates: Candidates, allowed: Bools, kept: dict[BudgetName, Bools], best: int
) -> tuple[BudgetName, ...]:
    """Each budget without which alone there were a better size; all if only all together."""
    better = allowed & (candidates.quality > candidates.quality[best])
    if not better.any():
        return ()
    alone = tuple(n for n in kept if _all([better, *_others(kept, n)]).any())
    return alone or tuple(name for name in kept if name != "min_quality")


def _all(masks: list[Bools]) -> Bools:
    return np.asarray(np.logical_and.reduce(masks))


def _others(kept: dict[BudgetName, Bools], name: BudgetName) -> list[Bools]:
    return [mask for other, mask in kept.items() if other != name]


def _infeasible(
    candidates: Candidates, constraints: Constraints, allowed: Bools, kept: dict[BudgetName, Bools]
) -> Infeasible:
    """Relax one constraint if one is enough, else several; the nearest is what exceeds least."""
    scoped = candidates.scoped_memory(constraints.mem_scope)
    seconds = candidates.percentile(constraints.latency_percentile)
    excess: dict[BudgetName, Floats] = {  # how many times over each budget each candidate is
        "max_mem_gb": scoped / max(constraints.max_mem_bytes or 1, 1),
        "max_latency_ms": seconds / (constraints.max_latency_seconds or 1),
        "min_quality": (constraints.min_quality or 1) / np.maximum(candidates.quality, 1e-12),
    }
    for name in kept:
        rest = _all([allowed, *_others(kept, name)])
        if rest.any():
            total = excess[name]
            break
    else:
        rest, total = allowed, np.max([excess[name] for name in kept], axis=0)
    indices = np.flatnonzero(rest)
    nearest = int(indices[np.argmin(total[indices])])
    # rounded to the safe side, and a digit further where that is lost again on the way back
    milliseconds = math.ceil(seconds[nearest] * 1e5) / 100
    milliseconds += 0.01 * (milliseconds / 1000 < seconds[nearest])
    quality = math.floor(candidates.quality[nearest] * 1e4) / 1e4
    quality -= 1e-4 * (quality > candidates.quality[nearest])
    needed: dict[BudgetName, float] = {
        "max_mem_gb": math.ceil(scoped[nearest] / 1e3) / 1e6,
        "max_latency_ms": milliseconds,
        "min_quality": quality,
    }
    binding = tuple(name for name, mask in kept.items() if not mask[nearest])
    (plan,) = candidates.plans([nearest])
    return Infeasible(binding, plan, {name: needed[name] for name in binding})


def _front(candidates: Candidates, memory: Ints, order: Ints) -> list[int]:
    """Indices of what nothing dominates, of some that are given best first.

    In that order a candidate is dominated only by one before it. The least latency of those
    that need no more memory is read off a staircase: memory ascending, latency descending. Most
    candidates are sorted out by a look at the staircase as the part before theirs has left it.
    """
    front: list[int] = []
    steps: list[int] = []
    latencies: list[float] = []
    for start in range(0, len(order), FRONT_PART):
        part = order[start : start + FRONT_PART]
        known = np.searchsorted(steps, memory[part], side="right")
        part = part[np.array([math.inf, *latencies])[known] > candidates.p95[part]]
        for index, needed, seconds in zip(
            part.tolist(), memory[part].tolist(), candidates.p95[part].tolist(), strict=True
        ):
            position = bisect.bisect_right(steps, needed)
            if position and latencies[position - 1] <= seconds:
                continue
            front.append(index)
            end = position
            while end < len(steps) and latencies[end] >= seconds:
                end += 1
            steps[position:end], latencies[position:end] = [needed], [seconds]
    return front
