"""The joint plan of random latencies beside the best of every measured size and sampling.

A solve is all of a request's work, as in `benchmarks.sizing.speed`; the service keeps tables of
candidates and their front, so that the next request has a kept solve.
"""

import contextlib
import gc
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
    kept_seconds: list[float] = []
    for name in families.DATA:
        family = families.shipped(name)
        manifest, table = family.manifest, family.quality
        assert table is not None
        profile = estimate_profile(family, 0, 1.0)

        def candidates(sampling_of: SamplingRequest) -> Candidates:
            workloads = (Workload(4, s) for s in table.samplings(sampling_of))  # noqa: B023
            return Candidates.of(manifest.network, manifest.sizes, table, profile, *workloads)  # noqa: B023

        every = candidates(SamplingRequest())
        gc.collect()
        gc.freeze()  # the service has no torch, which each full collection walks here
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
            for took in (seconds, kept_seconds):
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
        "kept_solve_p99_ms": round(1e3 * float(np.quantile(kept_seconds, 0.99)), 2),
    }
