"""Step costs that were measured once on a device class and kept for the next start."""

import contextlib

import torch
from pydantic import ValidationError
from redis import RedisError

from learngenes.config import Frozen
from learngenes.measuring.steps import StepCosts
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


class _Kept(Frozen):
    measured_as: MeasuredAs
    costs: StepCosts


class KeptStepCosts:
    """Step costs as they were measured where everything that they depend on was as it is."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def get(self, shared: SharedWeights, kernels: Kernels, max_rows: int) -> StepCosts | None:
        # Redis may be away, and what is there of another release
        with contextlib.suppress(RedisError, ValidationError):
            raw = self._runtime.repository.step_costs(*self._of(shared))
            kept = _Kept.model_validate_json(raw or "")
            if kept.measured_as == _measured_as(shared, kernels, max_rows):
                return kept.costs
        return None

    def keep(
        self, shared: SharedWeights, kernels: Kernels, max_rows: int, costs: StepCosts
    ) -> None:
        kept = _Kept(measured_as=_measured_as(shared, kernels, max_rows), costs=costs)
        with contextlib.suppress(RedisError):
            self._runtime.repository.keep_step_costs(*self._of(shared), kept.model_dump_json())

    def _of(self, shared: SharedWeights) -> tuple[str, str, str]:
        return self._runtime.device_class, shared.family.manifest.name, str(shared.compute)


def _measured_as(shared: SharedWeights, kernels: Kernels, max_rows: int) -> MeasuredAs:
    return MeasuredAs(
        family_fingerprint=shared.family.fingerprint,
        torch_version=torch.__version__,
        compiled=kernels.are_compiled,
        lanes=kernels.lanes.count,
        threads=kernels.lanes.threads,
        max_rows=max_rows,
    )
