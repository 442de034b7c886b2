"""The solver: from a budget to the best of all sizes that keep it."""

import bisect
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learngenes.config import NetworkConfig, SizeSpace, executable
from learngenes.sizing.budget import (
    BudgetName,
    Constraints,
    Cost,
    MemoryScope,
    Plan,
    Slack,
    Workload,
)
from learngenes.sizing.cost import (
    Execution,
    Ints,
    memory_bytes,
    process_bytes,
    shared_bytes,
)
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.quality import Floats, QualityTable

Bools = NDArray[np.bool_]


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
    """Every size in every execution, as columns."""

    workload: Workload
    executions: tuple[Execution, ...]
    execution: Ints
    depth: Ints
    rank: Ints
    memory: Ints
    process: Ints
    latency: Floats
    p95: Floats
    quality: Floats

    @classmethod
    def of(
        cls,
        network: NetworkConfig,
        sizes: SizeSpace,
        quality: QualityTable,
        profile: DeviceProfile,
        workload: Workload,
    ) -> "Candidates":
        depths, ranks = (a.ravel() for a in np.meshgrid(sizes.depths, sizes.ranks, indexing="ij"))
        executions = tuple(profile.executions)
        memory, latency, shared = [], [], []
        for execution in executions:
            needed = memory_bytes(network, depths, ranks, execution, workload)
            memory.append(needed + profile.memory_overhead_bytes)
            shared.append(shared_bytes(network, ranks, execution))
            latency.append(profile.latency_seconds(depths, ranks, execution, workload))
        ratios = [quality.dtype_loss_ratios.get(e.dtype, math.inf) for e in executions]
        every_depth, every_rank = (np.tile(a, len(executions)) for a in (depths, ranks))
        seconds = np.concatenate(latency)
        bytes_ = np.concatenate(memory)
        return cls(
            workload=workload,
            executions=executions,
            execution=np.repeat(np.arange(len(executions)), len(depths)),
            depth=every_depth,
            rank=every_rank,
            memory=bytes_,
            process=np.asarray(
                process_bytes(bytes_, np.concatenate(shared), profile.process_base_bytes)
            ),
            latency=seconds,
            p95=seconds * profile.p95_ratio,
            quality=quality.qualities(every_depth, every_rank, np.repeat(ratios, len(depths))),
        )

    def scoped_memory(self, scope: MemoryScope) -> Ints:
        return self.process if scope == "process" else self.memory

    def plans(self, indices: list[int]) -> list[Plan]:
        columns = (
            *(self.execution, self.depth, self.rank, self.memory, self.process),
            *(self.latency, self.p95, self.quality),
        )
        return [
            Plan(
                depth=depth,
                rank=rank,
                mode=self.executions[execution].mode,
                dtype=self.executions[execution].dtype,
                n=self.workload.n,
                predicted=Cost(memory, process, latency, p95),
                quality=quality,
            )
            for execution, depth, rank, memory, process, latency, p95, quality in zip(
                *(column[indices].tolist() for column in columns), strict=True
            )
        ]

    def plan(self, index: int) -> Plan:
        return self.plans([index])[0]


def solve(candidates: Candidates, constraints: Constraints) -> Solution:
    """The feasible size of highest predicted quality; among equals the one of lower latency.

    Exhaustive: no enumerated size that keeps the constraints is better. Raises Impossible,
    or Infeasible with the nearest plan and the budget that it would keep.
    """
    allowed = _allowed(candidates, constraints)
    kept = _kept(candidates, constraints)
    feasible = allowed & np.logical_and.reduce([np.ones_like(allowed), *kept.values()])
    if not feasible.any():
        raise _infeasible(candidates, constraints, allowed, kept)
    memory = candidates.scoped_memory(constraints.mem_scope)
    best = _best(candidates, memory, feasible)
    mem, latency = constraints.max_mem_bytes, constraints.max_latency_seconds
    return Solution(
        plan=candidates.plan(best),
        binding=_binding(candidates, allowed, kept, best),
        slack=Slack(
            memory_bytes=None if mem is None else int(mem - memory[best]),
            latency_seconds=None if latency is None else float(latency - candidates.p95[best]),
        ),
        front=tuple(candidates.plans(_front(candidates, constraints, allowed))),
    )


def _allowed(candidates: Candidates, constraints: Constraints) -> Bools:
    """Candidates with the fixed depth, rank, mode and dtype. Raises Impossible."""
    if (
        constraints.mode
        and constraints.dtype
        and not executable(constraints.mode, constraints.dtype)
    ):
        raise Impossible(
            "dtype int8 is for mode factored: a materialised weight is never stored in it"
        )
    modes = np.array([e.mode for e in candidates.executions])[candidates.execution]
    dtypes = np.array([e.dtype for e in candidates.executions])[candidates.execution]
    allowed = candidates.quality > 0
    for name, column in (
        ("depth", candidates.depth),
        ("rank", candidates.rank),
        ("mode", modes),
        ("dtype", dtypes),
    ):
        wanted = getattr(constraints, name)
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
        kept["max_latency_ms"] = candidates.p95 <= constraints.max_latency_seconds
    if constraints.min_quality is not None:
        kept["min_quality"] = candidates.quality >= constraints.min_quality
    return kept


def _best(candidates: Candidates, memory: Ints, among: Bools) -> int:
    """Index of the best candidate, in the order of `_front`, so that the plan is on it."""
    indices = np.flatnonzero(among)
    order = np.lexsort((memory[indices], candidates.p95[indices], -candidates.quality[indices]))
    return int(indices[order[0]])


def _binding(
    candidates: Candidates, allowed: Bools, kept: dict[BudgetName, Bools], best: int
) -> tuple[BudgetName, ...]:
    """Each budget without which alone there were a better size; all if only all together."""
    better = allowed & (candidates.quality > candidates.quality[best])
    if not better.any():
        return ()
    alone = tuple(
        name
        for name in kept
        if (better & np.logical_and.reduce([better, *_others(kept, name)])).any()
    )
    return alone or tuple(name for name in kept if name != "min_quality")


def _others(kept: dict[BudgetName, Bools], name: BudgetName) -> list[Bools]:
    return [mask for other, mask in kept.items() if other != name]


def _infeasible(
    candidates: Candidates,
    constraints: Constraints,
    allowed: Bools,
    kept: dict[BudgetName, Bools],
) -> Infeasible:
    """Relax one constraint if one is enough, else several; the nearest is what exceeds least."""
    excess = _excess(candidates, constraints)
    for name in kept:
        rest = allowed & np.logical_and.reduce([allowed, *_others(kept, name)])
        if rest.any():
            total = excess[name]
            break
    else:
        rest, total = allowed, np.max([excess[name] for name in kept], axis=0)
    indices = np.flatnonzero(rest)
    nearest = int(indices[np.argmin(total[indices])])
    memory = candidates.scoped_memory(constraints.mem_scope)[nearest]
    # rounded to the safe side, and a digit further where that is lost again on the way back
    milliseconds = math.ceil(candidates.p95[nearest] * 1e5) / 100
    milliseconds += 0.01 * (milliseconds / 1000 < candidates.p95[nearest])
    quality = math.floor(candidates.quality[nearest] * 1e4) / 1e4
    quality -= 1e-4 * (quality > candidates.quality[nearest])
    needed: dict[BudgetName, float] = {
        "max_mem_gb": math.ceil(memory / 1e3) / 1e6,
        "max_latency_ms": milliseconds,
        "min_quality": quality,
    }
    binding = tuple(name for name, mask in kept.items() if not mask[nearest])
    return Infeasible(binding, candidates.plan(nearest), {name: needed[name] for name in binding})


def _excess(candidates: Candidates, constraints: Constraints) -> dict[BudgetName, Floats]:
    """How many times over each constraint each candidate is."""
    memory = candidates.scoped_memory(constraints.mem_scope)
    return {
        "max_mem_gb": memory / max(constraints.max_mem_bytes or 1, 1),
        "max_latency_ms": candidates.p95 / (constraints.max_latency_seconds or 1),
        "min_quality": (constraints.min_quality or 1) / np.maximum(candidates.quality, 1e-12),
    }


def _front(candidates: Candidates, constraints: Constraints, allowed: Bools) -> list[int]:
    """Indices of what nothing dominates, best quality first.

    In that order a candidate is dominated only by one before it. The least latency of those
    that need no more memory is read off a staircase: memory ascending, latency descending.
    """
    indices = np.flatnonzero(allowed)
    memory = candidates.scoped_memory(constraints.mem_scope)[indices]
    p95 = candidates.p95[indices]
    order = np.lexsort((memory, p95, -candidates.quality[indices]))
    front: list[int] = []
    steps: list[int] = []
    latencies: list[float] = []
    for index, needed, seconds in zip(
        indices[order].tolist(), memory[order].tolist(), p95[order].tolist(), strict=True
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
