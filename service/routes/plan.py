"""/plan: the size that a budget would give."""

from fastapi import APIRouter

from fineserve.wire import PlanRequest, PlanResponse
from service.access import Anybody
from service.deps import StateDep
from service.planning import choose_site, solve_budget

router = APIRouter(tags=["sizing"])


@router.post("/plan")
def plan(request: PlanRequest, state: StateDep, _: Anybody) -> PlanResponse:
    """A dry run: the size that a budget would give, what binds it, and the Pareto front."""
    site = choose_site(state, request, live=False)
    solution = solve_budget(state, request, site)
    return PlanResponse(
        family=site.family.name,
        device_class=site.profile.device_class,
        profiled_at=site.profile.measured_at,
        plan=solution.plan,
        binding=solution.binding,
        slack=solution.slack,
        front=solution.front,
    )
