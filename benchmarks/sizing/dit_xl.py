"""Check 3: the shapes of DiT-XL/2, each way of running depth 28, and budgets in gigabytes."""

from benchmarks.parts import Figures, say
from benchmarks.sizing.subjects import describe, dit_xl
from learngenes.config import DType, Mode
from learngenes.sizing.budget import Budget, Constraints, Plan, Workload
from learngenes.sizing.cost import weight_bytes
from learngenes.sizing.solver import solve

WORKLOAD = Workload.of(n=1, num_inference_steps=1)
BUDGETS_GB = (0.25, 0.5, 1.0, 2.0, 4.0)
LATENCIES_MS = (None, 2000)
"""Depth 28 factored fits all of these; in a hurry, more memory buys a better model."""
DEEPEST = 28
WAYS = {
    "dense bfloat16": Constraints(mode=Mode.MATERIALISED, dtype=DType.BFLOAT16, rank=1152),
    "materialised float32": Constraints(mode=Mode.MATERIALISED, dtype=DType.FLOAT32, rank=1152),
    "factored float32": Constraints(mode=Mode.FACTORED, dtype=DType.FLOAT32, rank=1152),
    "factored bfloat16": Constraints(mode=Mode.FACTORED, dtype=DType.BFLOAT16, rank=1152),
    "factored int8": Constraints(mode=Mode.FACTORED, dtype=DType.INT8, rank=1152),
}


def measure() -> Figures:
    subject = dit_xl()
    candidates = subject.candidates(WORKLOAD)
    ways = {}
    for name, constraints in WAYS.items():
        plan = solve(candidates, constraints.model_copy(update={"depth": DEEPEST})).plan
        ways[name] = _checked(plan, name)
    needed = candidates.memory[candidates.depth == DEEPEST].min()
    smallest = solve(candidates, Constraints(depth=DEEPEST, max_mem_bytes=int(needed))).plan
    least = _checked(smallest, f"the least budget of depth {DEEPEST}")
    budgets = []
    for latency_ms in LATENCIES_MS:
        for budget_gb in BUDGETS_GB:
            budget = {"max_mem_gb": budget_gb, "max_latency_ms": latency_ms}
            plan = solve(candidates, Budget.model_validate(budget).constraints).plan
            figures = _checked(plan, f"{budget_gb} GB, {latency_ms} ms")
            within = figures["measured_bytes"] <= budget_gb * 1e9
            budgets.append({**budget, **figures, "quality": plan.quality, "within": within})
    return {
        "dit_xl_dense_bf16_bytes": ways["dense bfloat16"]["weight_bytes"],
        "dit_xl_factored_bytes": ways["factored bfloat16"]["weight_bytes"],
        "ways": ways,
        "least_budget_of_full_depth": {"budget_bytes": int(needed), **least},
        "budgets": budgets,
    }


def _checked(plan: Plan, name: str) -> Figures:
    """A plan's bytes as predicted and as measured in a fresh process."""
    subject = dit_xl()
    result = subject.measure(plan, WORKLOAD, max_seconds=0)
    execution = next(
        e for e in subject.profile.executions if (e.mode, e.dtype) == (plan.mode, plan.dtype)
    )
    weights = weight_bytes(subject.family.manifest.network, plan.depth, plan.rank, execution)
    figures = {
        "size": describe(plan),
        "weight_bytes": int(weights),
        "predicted_bytes": plan.predicted.memory_bytes,
        "measured_bytes": result.memory_bytes,
        "measured_process_bytes": result.process_memory_bytes,
        "measured_seconds": result.latency_seconds,
        "measured_p95_seconds": result.latency_p95_seconds,
    }
    say(f"{name}:", **figures)
    return figures
