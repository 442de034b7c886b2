"""Comparison of a measured model with its budget, and the smaller plan to try next."""

from collections.abc import Sequence

from learngenes.sizing.budget import Budget, Constraints, Cost, Plan
from learngenes.sizing.solver import Candidates, Impossible, Infeasible, solve

MOST_STEPS_DOWN = 3
MEMORY, LATENCY = "max_mem_gb", "max_latency_ms"


class OverBudget(Exception):
    """The finished model needs more than its budget, and no smaller one is left."""


def budgets_missed(
    constraints: Constraints, measured: Cost, *, disturbed: bool = False
) -> list[str]:
    """Fields of its budget that a measured model does not keep; a latency is not, if disturbed."""
    missed = []
    memory, latency = constraints.max_mem_bytes, constraints.max_latency_seconds
    if memory is not None and measured.scoped_memory_bytes(constraints.mem_scope) > memory:
        missed.append(MEMORY)
    seconds = measured.percentile_seconds(constraints.latency_percentile)
    if latency is not None and not disturbed and seconds > latency:
        missed.append(LATENCY)
    return missed


def tightened(
    constraints: Constraints, predicted: Cost, measured: Cost, missed: Sequence[str]
) -> Constraints:
    """Constraints for predictions, tightened by how far this model `missed` its own."""
    scope, percentile = constraints.mem_scope, constraints.latency_percentile
    tighter: dict[str, float] = {}
    if MEMORY in missed and constraints.max_mem_bytes is not None:
        share = predicted.scoped_memory_bytes(scope) / measured.scoped_memory_bytes(scope)
        tighter["max_mem_bytes"] = int(constraints.max_mem_bytes * min(1, share))
    if LATENCY in missed and constraints.max_latency_seconds is not None:
        share = predicted.percentile_seconds(percentile) / measured.percentile_seconds(percentile)
        tighter["max_latency_seconds"] = constraints.max_latency_seconds * min(1, share)
    return constraints.model_copy(update=tighter)


def step_down(
    plan: Plan,
    budget: Budget,
    measured: Cost,
    tried: int,
    candidates: Candidates,
    missed: Sequence[str],
) -> Plan:
    """Best of `candidates` that keeps the budget if it misses its prediction as `plan` did.

    Raises OverBudget when there is none, or when MOST_STEPS_DOWN were `tried`.
    """
    constraints = budget.constraints
    percentile = constraints.latency_percentile
    story = (
        f"depth {plan.depth}, rank {plan.rank}, {plan.mode}, {plan.dtype} was measured at "
        f"{measured.scoped_memory_bytes(constraints.mem_scope)} bytes and "
        f"{measured.percentile_seconds(percentile):.3f} s ({percentile}th percentile), over "
        f"{' and '.join(missed)} of "
        f"{budget.model_dump(exclude_none=True)}"
    )
    if tried >= MOST_STEPS_DOWN:
        raise OverBudget(f"{story}, after {MOST_STEPS_DOWN} smaller ones; raise the budget")
    try:
        predicted = candidates.predicted(plan)
        return solve(candidates, tightened(constraints, predicted, measured, missed)).plan
    except (Impossible, Infeasible) as error:
        raise OverBudget(f"{story}; {error}; raise the budget or fix less") from error
