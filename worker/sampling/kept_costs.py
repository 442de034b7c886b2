"""Step costs that were measured once on a device class and kept for the next start."""

import contextlib
from collections.abc import Callable

import torch
from pydantic import ValidationError

from learngenes.config import Frozen
from learngenes.measuring.steps import StepCosts, measure_step_costs
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.weights import SharedWeights
from worker.runtime import Runtime


class MeasuredAs(Frozen):
    """Everything that the step costs of a family in one dtype depend on."""

    family_fingerprint: str
    torch_version: str
    compiled: bool
    lanes: int
    threads: int
    max_rows: int


class KeptStepCosts(Frozen):
    measured_as: MeasuredAs
    costs: StepCosts


def kept_step_costs(
    runtime: Runtime,
    shared: SharedWeights,
    kernels: Kernels,
    max_rows: int,
    measure: Callable[[SharedWeights, Kernels, int], StepCosts] = measure_step_costs,
) -> StepCosts:
    """Kept costs where everything that they depend on is as it was; else new ones, kept."""
    measured_as = MeasuredAs(
        family_fingerprint=shared.family.fingerprint,
        torch_version=torch.__version__,
        compiled=kernels.are_compiled,
        lanes=kernels.lanes.count,
        threads=kernels.lanes.threads,
        max_rows=max_rows,
    )
    of = runtime.device_class, shared.family.manifest.name, str(shared.compute)
    with contextlib.suppress(ValidationError):  # there are none, or of another release
        kept = KeptStepCosts.model_validate_json(runtime.repository.step_costs(*of) or "")
        if kept.measured_as == measured_as:
            return kept.costs
    costs = measure(shared, kernels, max_rows)
    kept = KeptStepCosts(measured_as=measured_as, costs=costs)
    runtime.repository.keep_step_costs(*of, kept.model_dump_json())
    return costs
