"""Measured speed of a device for a family: everything that sizing cannot compute."""

from datetime import datetime
from typing import Literal, Self

import numpy as np
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from learngenes.config import DType, Frozen, Mode
from learngenes.sizing.budget import Cost, Workload
from learngenes.sizing.cost import Execution, Ints
from learngenes.sizing.quality import Floats

PROFILE_VERSION: Literal[2] = 2
LEAST_DRIFT_WEIGHT = 0.1
"""Weight of a measurement in the speed correction when there were many before it."""
MOST_DRIFT = 4.0
P95_STEP = 0.1
P95_MISSES = 0.03
"""Share of measured 95th percentiles that p95_ratio settles to leave outside."""
P95_RATIO_RANGE = (1.05, 2.0)


class LayerCost(Frozen):
    """Seconds of one block in one execution, over a grid of rank x rows."""

    mode: Mode
    dtype: DType
    seconds: tuple[tuple[NonNegativeFloat, ...], ...]
    """One row per rank (a single one when materialised), one column per number of rows."""
    correction: PositiveFloat = 1.0
    """Ratio of whole batches to the sum of their parts."""


class DeviceProfile(Frozen):
    """Constants of one family on one class of device.

    Latency of a batch is affine in depth: request + images x image + steps x (step + depth x
    layer), the last two piecewise linear in rows, the layer's also in rank.
    """

    version: Literal[2] = PROFILE_VERSION
    device_class: str
    torch_version: str
    family: str
    family_fingerprint: str
    measured_at: datetime
    native_bfloat16: bool
    packing_threads: NonNegativeInt = 0
    process_base_bytes: NonNegativeInt
    """Bytes of a serving process without its one model: runtime, libraries, the family."""
    memory_overhead_bytes: NonNegativeInt = 0
    """Bytes that the device's libraries take of the allocator beside the network's live set."""
    rows: tuple[PositiveInt, ...]
    ranks: tuple[PositiveInt, ...]
    request_seconds: NonNegativeFloat
    image_seconds: NonNegativeFloat = 0
    """Seconds to decode the latents of one image."""
    step_seconds: tuple[NonNegativeFloat, ...]
    """Seconds of a step without its blocks, for each number of rows."""
    layers: tuple[LayerCost, ...]
    speed_correction: PositiveFloat = 1.0
    """Ratio of recent latencies to those when the device was profiled."""
    corrections: NonNegativeInt = 0
    """Number of measured models that have corrected the profile."""
    p95_ratio: float = Field(ge=1)
    """Ratio of a batch's 95th percentile to its predicted median."""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for ranks, table in (
            ((1,), (self.step_seconds,)),
            *(((1, len(self.ranks)), layer.seconds) for layer in self.layers),
        ):
            if len(table) not in ranks or {len(row) for row in table} != {len(self.rows)}:
                raise ValueError("each table needs a row per rank, and a column per number of rows")
        return self

    @classmethod
    def fitting(
        cls, raw: str | None, family_fingerprint: str, torch_version: str | None
    ) -> Self | None:
        """Parse a kept profile if it was measured with these weights and this torch.

        None where there is none, it is stale, or another release of fineserve wrote it.
        `torch_version` is None where no worker is there to say.
        """
        try:
            profile = cls.model_validate_json(raw or "")
        except ValidationError:
            return None
        same_torch = torch_version in (None, profile.torch_version)
        return profile if same_torch and profile.family_fingerprint == family_fingerprint else None

    @property
    def executions(self) -> list[Execution]:
        native, threads = self.native_bfloat16, self.packing_threads
        return [Execution(c.mode, c.dtype, native, threads) for c in self.layers]

    def latency_seconds(
        self, depth: Ints | int, rank: Ints | int, execution: Execution, workload: Workload
    ) -> Floats:
        """Median seconds of one batch; vectorised over depth and rank."""
        cost = self._cost(execution)
        by_rank = [_linear(workload.rows, self.rows, row) for row in cost.seconds]
        layer = np.interp(rank, self.ranks, by_rank) if len(by_rank) > 1 else by_rank[0]
        step = _linear(workload.rows, self.rows, self.step_seconds) + depth * layer
        request = self.request_seconds + workload.n * self.image_seconds
        seconds = request + workload.num_inference_steps * step
        return np.asarray(seconds * cost.correction * self.speed_correction)

    def corrected(self, predicted: Cost, measured: Cost) -> "DeviceProfile":
        """This profile after a model was measured.

        Too little memory predicted raises a constant at once, the speed becomes a running mean,
        and the ratio of the 95th percentile moves by a step that makes P95_MISSES of them too low.
        """
        weight = max(LEAST_DRIFT_WEIGHT, 1 / (2 + self.corrections))
        more = max(0, measured.memory_bytes - predicted.memory_bytes)
        process_more = max(0, measured.process_memory_bytes - predicted.process_memory_bytes)
        drift = np.clip(
            measured.latency_seconds / predicted.latency_seconds, 1 / MOST_DRIFT, MOST_DRIFT
        )
        missed = measured.latency_p95_seconds > predicted.latency_p95_seconds
        tail = self.p95_ratio * np.exp(P95_STEP * (missed - P95_MISSES))
        return self.model_copy(
            update={
                "speed_correction": self.speed_correction * float(drift) ** weight,
                "corrections": self.corrections + 1,
                "memory_overhead_bytes": self.memory_overhead_bytes + more,
                "process_base_bytes": self.process_base_bytes + max(0, process_more - more),
                "p95_ratio": float(np.clip(tail, *P95_RATIO_RANGE)),
            }
        )

    def _cost(self, execution: Execution) -> LayerCost:
        for cost in self.layers:
            if (cost.mode, cost.dtype) == (execution.mode, execution.dtype):
                return cost
        raise KeyError(f"{execution.mode} {execution.dtype} was not profiled")


def _linear(x: float, xs: tuple[int, ...], ys: tuple[float, ...]) -> float:
    """Piecewise linear interpolation; beyond the last point the last slope goes on."""
    if x > xs[-1] and len(xs) > 1:
        slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
        return ys[-1] + slope * (x - xs[-1])
    return float(np.interp(x, xs, ys))
