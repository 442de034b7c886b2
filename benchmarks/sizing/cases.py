"""Check 1: random budgets, each planned, measured in a fresh process, and learned from.

What the build worker does, but for the retraining, which changes no cost: plan with the
profile as it stands, measure, correct the profile. The plan counts as it is: a budget that it
breaks is broken here, while the worker would step down.
"""

import math
import random
from datetime import UTC, datetime

import matplotlib as mpl
import numpy as np

from benchmarks.parts import RESULTS, Figures, say
from benchmarks.sizing.subjects import describe, dit_xl, fashion
from learngenes.config import Mode
from learngenes.sizing.budget import Constraints, Cost, Workload
from learngenes.sizing.solver import Candidates, Infeasible, solve

mpl.use("Agg")
from matplotlib import pyplot as plt

CASES = {"fashion": 100, "dit-xl-2": 100}
SEED = 2409
MEASURED_SECONDS = 5.0
REFERENCE = Workload.of(n=4, num_inference_steps=10)
REFERENCE_EVERY = 10
MOST_SECONDS = {"fashion": 6.0, "dit-xl-2": 2.5}
"""The longest latency budget: else one case would take minutes to measure."""


def measure() -> Figures:
    chance = random.Random(SEED)
    measured: list[Figures] = []
    noise: list[float] = []
    for subject in (fashion(), dit_xl()):
        while sum(case["family"] == subject.name for case in measured) < CASES[subject.name]:
            workload = _workload(chance, subject.name)
            candidates = subject.candidates(workload)
            constraints = _budget(chance, candidates, MOST_SECONDS[subject.name])
            try:
                plan = solve(candidates, constraints).plan
            except Infeasible:
                continue  # another draw: the two budgets contradict each other
            if len(measured) % REFERENCE_EVERY == 0:
                noise.append(_reference_seconds())
                say("the same size again:", seconds=f"{noise[-1]:.3f}")
            result = subject.measure(plan, workload, MEASURED_SECONDS)
            subject.profile = subject.profile.corrected(
                plan.predicted, result, subject.profile.overhead_seconds, datetime.now(UTC)
            )
            case = {
                "family": subject.name,
                "size": describe(plan),
                "n": workload.n,
                "num_inference_steps": workload.num_inference_steps,
                "guided": workload.guided_steps > 0,
                "max_mem_bytes": constraints.max_mem_bytes,
                "max_latency_seconds": constraints.max_latency_seconds,
                "predicted": _plain(plan.predicted),
                "measured": _plain(result),
            }
            measured.append(case)
            say(
                f"{len(measured):3} {subject.name} {describe(plan):34}",
                memory=f"{_ratio(case, 'memory_bytes'):.4f}",
                latency=f"{_ratio(case, 'latency_seconds'):.3f}",
                over=over(case) or "-",
            )
    figures = summary(measured, noise)
    say("in all", **{name: value for name, value in figures.items() if name != "measured"})
    return figures


def summary(measured: list[Figures], noise: list[float]) -> Figures:
    memory = [abs(_ratio(case, "memory_bytes") - 1) for case in measured]
    latency = [abs(_ratio(case, "latency_seconds") - 1) for case in measured]
    timed = [case for case in measured if case["max_latency_seconds"] is not None]
    return {
        "cases": len(measured),
        "over_budget": sum("memory" in over(case) for case in measured),
        "memory_error_median": float(np.median(memory)),
        "memory_error_max": max(memory),
        "latency_error_median": float(np.median(latency)),
        "latency_error_p95": float(np.quantile(latency, 0.95)),
        "latency_budgets": len(timed),
        "latency_within_budget_share": sum("latency" not in over(c) for c in timed) / len(timed),
        "machine_noise": {
            "what": f"one size of fashion measured {len(noise)} times in the same way",
            "error_median": float(np.median(np.abs(np.median(noise) / np.array(noise) - 1))),
            "seconds": noise,
        },
        "measured": measured,
    }


def over(case: Figures) -> list[str]:
    """Which budgets of a case its first plan broke."""
    broken = []
    memory, latency = case["max_mem_bytes"], case["max_latency_seconds"]
    if memory is not None and case["measured"]["memory_bytes"] > memory:
        broken.append("memory")
    if latency is not None and case["measured"]["latency_p95_seconds"] > latency:
        broken.append("latency")
    return broken


def draw(measured: list[Figures]) -> None:
    """Measured over predicted, for memory and for latency, against what was predicted."""
    figure, (memory, latency) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, colour in (("fashion", "tab:blue"), ("dit-xl-2", "tab:orange")):
        cases = [case for case in measured if case["family"] == name]
        for axes, what, unit in ((memory, "memory_bytes", 1e6), (latency, "latency_seconds", 1)):
            predicted = [case["predicted"][what] / unit for case in cases]
            axes.scatter(
                predicted, [1 / _ratio(c, what) for c in cases], s=14, c=colour, label=name
            )
    for axes, title, most in (
        (memory, "memory predicted, MB", 0.05),
        (latency, "median of one batch predicted, s", 0.5),
    ):
        axes.set(
            xscale="log", xlabel=title, ylabel="measured / predicted", ylim=(1 - most, 1 + most)
        )
        axes.axhline(1, color="grey", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(RESULTS / "sizing.png", dpi=90)
    plt.close(figure)


def _workload(chance: random.Random, family: str) -> Workload:
    """DiT-XL/2 takes seconds a step on two cores: one image, one or two steps."""
    guided = chance.random() < 0.7
    if family == "fashion":
        n, steps = chance.choice((1, 2, 4, 8)), chance.choice((5, 10, 20))
    else:
        n, steps = 1, chance.choice((1, 2))
    return Workload.of(n=n, num_inference_steps=steps, guidance_scale=2 if guided else 1)


def _budget(chance: random.Random, candidates: Candidates, most_seconds: float) -> Constraints:
    """Memory, latency or both, log-uniform over what the sizes need; always latency if slow."""
    slow = candidates.p95.max() > most_seconds
    with_latency = slow or chance.random() < 2 / 3
    with_memory = not with_latency or chance.random() < 0.5
    memory = _between(chance, candidates.memory.min(), 1.2 * candidates.memory.max())
    longest = min(1.2 * candidates.p95.max(), most_seconds)
    seconds = _between(chance, candidates.p95.min(), longest)
    return Constraints(
        max_mem_bytes=int(memory) if with_memory else None,
        max_latency_seconds=seconds if with_latency else None,
    )


def _between(chance: random.Random, low: float, high: float) -> float:
    return math.exp(chance.uniform(math.log(low), math.log(high)))


def _reference_seconds() -> float:
    """Seconds of one size, always the same: what differs is the machine."""
    plan = solve(fashion().candidates(REFERENCE), Constraints(mode=Mode.MATERIALISED)).plan
    return fashion().measure(plan, REFERENCE, MEASURED_SECONDS).latency_seconds


def _ratio(case: Figures, what: str) -> float:
    return float(case["predicted"][what] / case["measured"][what])


def _plain(cost: Cost) -> Figures:
    return {name: getattr(cost, name) for name in Cost.__slots__}
