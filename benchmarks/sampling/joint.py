"""The joint plan of random latencies beside the best of every measured size and sampling.

The service keeps its tables of candidates: a first solve makes them, and their front.
"""

import contextlib
import random
import time

import numpy as np

from benchmarks.parts import Figures
from benchmarks.sampling import families
from learngenes.config import SamplingRequest
from learngenes.measuring.device import estimate_profile
from learngenes.sizing.budget import Constraints, Workload
from learngenes.sizing.solver import Candidates, Infeasible, solve

BUDGETS = 50
TIMED = 300


def measure() -> Figures:
    chance, figures = random.Random(0), {}
    worse, solved = 0.0, 0
    seconds: list[float] = []
    first_seconds: list[float] = []
    for name in families.DATA:
        family = families.shipped(name)
        manifest, table = family.manifest, family.quality
        assert table is not None
        profile = estimate_profile(family, 0, 1.0)

        def candidates(sampling_of: SamplingRequest) -> Candidates:
            workloads = (Workload(4, s) for s in table.samplings(sampling_of))  # noqa: B023
            return Candidates.of(manifest.network, manifest.sizes, table, profile, *workloads)  # noqa: B023

        every = candidates(SamplingRequest())
        plans = [p for p in every.plans([*range(len(every.depth))]) if p.quality > 0]
        least = min(plan.predicted.latency_p95_seconds for plan in plans)
        most = max(plan.predicted.latency_p95_seconds for plan in plans)
        for _ in range(BUDGETS):
            budget = least * (most / least) ** chance.random()
            best = max(
                (p for p in plans if p.predicted.latency_p95_seconds <= budget),
                key=lambda plan: plan.quality,
            )
            plan = solve(every, Constraints(max_latency_seconds=budget)).plan
            worse, solved = max(worse, best.quality - plan.quality), solved + 1
        for _ in range(TIMED):
            budget = least * (most / least) ** chance.random()
            constraints = Constraints(max_latency_seconds=budget)
            begun = time.perf_counter()
            anew = candidates(SamplingRequest())
            for took in (first_seconds, seconds):
                with contextlib.suppress(Infeasible):
                    solve(anew, constraints)
                took.append(time.perf_counter() - begun)
                begun = time.perf_counter()
        figures[f"{name}_candidates"] = len(plans)
        figures[f"{name}_heldout_error"] = table.pictures.heldout_error if table.pictures else None
    return {
        **figures,
        "budgets": solved,
        "joint_worse_than_brute_force": round(worse, 6),
        "solve_p99_ms": round(1e3 * float(np.quantile(seconds, 0.99)), 2),
        "first_solve_p99_ms": round(1e3 * float(np.quantile(first_seconds, 0.99)), 2),
    }
