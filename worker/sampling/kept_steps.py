"""What an engine has measured of its steps, kept for the next start and for the profile."""

import contextlib
from datetime import UTC, datetime

import torch
from pydantic import Field, ValidationError
from redis import RedisError

from learngenes.config import Frozen
from learngenes.family.family import Family
from learngenes.measuring.device import ComputeTimes
from learngenes.measuring.steps import StepCosts
from learngenes.stepping.kernels import Kernels
from registry.repository import Repository
from worker.runtime import Runtime


class MeasuredAs(Frozen):
    """Everything that the steps of a family in one dtype depend on."""

    family_fingerprint: str
    torch_version: str
    compiled: bool
    lanes: int
    threads: int
    max_rows: int


class Measured(Frozen):
    """Steps of a family in one dtype of computing, measured when the device was idle."""

    measured_as: MeasuredAs
    costs: StepCosts
    times: ComputeTimes
    measured_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class KeptSteps:
    """Steps as they were measured where everything that they depend on was as it is."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def get(
        self, family: Family, compute: torch.dtype, kernels: Kernels, max_rows: int
    ) -> tuple[StepCosts, bool] | None:
        """Step costs, and whether they are those of exactly these kernels."""
        with contextlib.suppress(RedisError):  # it may be away
            device_class = self._runtime.device_class
            kept = measured_steps(self._runtime.repository, device_class, family, compute)
            if kept is not None:
                exactly = _measured_as(family, kernels, max_rows)
                return kept.costs, kept.measured_as == exactly
        return None

    def keep(
        self,
        family: Family,
        compute: torch.dtype,
        kernels: Kernels,
        max_rows: int,
        costs: StepCosts,
        times: ComputeTimes,
    ) -> None:
        kept = Measured(
            measured_as=_measured_as(family, kernels, max_rows), costs=costs, times=times
        )
        of = self._runtime.device_class, family.manifest.name, str(compute)
        with contextlib.suppress(RedisError):
            self._runtime.repository.keep_step_costs(*of, kept.model_dump_json())


def measured_steps(
    repository: Repository, device_class: str, family: Family, compute: torch.dtype
) -> Measured | None:
    """Steps of these weights with this torch; None where there are none, or of another release."""
    raw = repository.step_costs(device_class, family.manifest.name, str(compute))
    with contextlib.suppress(ValidationError):
        kept = Measured.model_validate_json(raw or "")
        now = (family.fingerprint, torch.__version__)
        if (kept.measured_as.family_fingerprint, kept.measured_as.torch_version) == now:
            return kept
    return None


def _measured_as(family: Family, kernels: Kernels, max_rows: int) -> MeasuredAs:
    return MeasuredAs(
        family_fingerprint=family.fingerprint,
        torch_version=torch.__version__,
        compiled=kernels.are_compiled,
        lanes=kernels.lanes.count,
        threads=kernels.lanes.threads,
        max_rows=max_rows,
    )
