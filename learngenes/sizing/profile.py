"""Measured speed of a device for a family: everything that sizing cannot compute."""

import functools
import statistics
from collections.abc import Sequence
from datetime import datetime, timedelta
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

from learngenes.config import DType, Frozen, Mode, Size
from learngenes.sizing.budget import Cost, Workload
from learngenes.sizing.cost import Execution, Ints
from learngenes.sizing.quality import Floats

PROFILE_VERSION: Literal[3] = 3
ESTIMATE_RATIO = 2.5
"""Ratio within which, and whose inverse, nine of ten estimated latencies are right."""
MEASURED_RATIO = 1.25
"""The same where the device was measured."""
MOST_OBSERVATIONS = 15
OBSERVATION_DAYS = 7
NEUTRAL_OBSERVATIONS = (1.0, 1.0)
"""What is observed before anything is: one model, or two, change half of nothing."""
MOST_CORRECTION = 2.0
P95_STEP = 0.1
P95_MISSES = 0.03
"""Share of measured 95th percentiles that p95_ratio settles to leave outside."""
P95_RATIO_RANGE = (1.05, 2.0)
FIRST_P95_RATIO = 1.6
"""Ratio of the 95th percentile to the median until some were observed; 1.25 was kept by 65 % of 40
models, 1.5 by 89 % of 36 (`make bench-start`)."""


class LayerCost(Frozen):
    """Seconds of one execution: of a step without its blocks, and of a block, over rank x rows."""

    mode: Mode
    dtype: DType
    rows: tuple[PositiveInt, ...]
    ranks: tuple[PositiveInt, ...]
    """Ranks that were measured; one where the rank does not matter."""
    step_seconds: tuple[NonNegativeFloat, ...]
    """Seconds of a step without its blocks, for each number of rows."""
    seconds: tuple[tuple[NonNegativeFloat, ...], ...]
    """Seconds of one block: one row per rank, one column per number of rows."""
    estimated: bool = False
    """Whether it was measured in a hurry, or by other kernels than those that serve."""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        if len(self.seconds) != len(self.ranks) or {
            len(row) for row in (self.step_seconds, *self.seconds)
        } != {len(self.rows)}:
            raise ValueError("there must be a row per rank, and a column per number of rows")
        return self

    def step(self, depth: Ints | int, rank: Ints | int, rows: int) -> Floats:
        """Seconds of one step; vectorised over depth and rank."""
        return np.asarray(self._without_blocks(rows) + depth * self._block(rank, rows))

    def guided_step(self, depth: Ints | int, rank: Ints | int, n: int, guide: Size) -> Floats:
        """The same of `n` images, each with a row of the model and one of its guide."""
        own, others = self._block(rank, n), self._block(guide.rank, n)
        return np.asarray(self._without_blocks(2 * n) + depth * own + guide.depth * others)

    def _without_blocks(self, rows: int) -> float:
        return _linear(rows, self.rows, self.step_seconds)

    def _block(self, rank: Ints | int, rows: int) -> Floats | float:
        by_rank = [_linear(rows, self.rows, row) for row in self.seconds]
        return np.interp(rank, self.ranks, by_rank) if len(by_rank) > 1 else by_rank[0]


class Observation(Frozen):
    """A model that was served on an idle device, beside what the profile alone says of it."""

    ratio: PositiveFloat
    """Ratio of its seconds on the device to those of the profile without any correction."""
    overhead_seconds: NonNegativeFloat
    """Seconds of a request before and after: queue, pictures, store."""
    at: datetime


class DeviceProfile(Frozen):
    """Constants of one family on one class of device.

    Latency of a batch is affine in depth: overhead + images x image + steps x (step + depth x
    layer), the last two piecewise linear in rows, the layer's also in rank.
    """

    version: Literal[3] = PROFILE_VERSION
    device_class: str
    torch_version: str
    family: str
    family_fingerprint: str
    measured_at: datetime
    native_bfloat16: bool
    packing_threads: NonNegativeInt = 0
    process_base_bytes: NonNegativeInt
    """Bytes of a serving process without its one model: runtime, libraries, the family."""
    memory_estimated: bool = False
    """Whether process_base_bytes is a guess; a fresh process has not been measured yet."""
    memory_overhead_bytes: NonNegativeInt = 0
    """Bytes that the device's libraries take of the allocator beside the network's live set."""
    request_seconds: NonNegativeFloat
    """Overhead of a request until some were observed."""
    image_seconds: NonNegativeFloat = 0
    """Seconds to decode the latents of one image, and to write its file."""
    layers: tuple[LayerCost, ...]
    observations: tuple[Observation, ...] = ()
    """Last models that were measured as they are served, the newest last."""
    p95_ratio: float = Field(FIRST_P95_RATIO, ge=1)
    """Ratio of a batch's 95th percentile to its predicted median."""

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

    @property
    def estimated(self) -> bool:
        """Whether any latency is an estimate."""
        return any(cost.estimated for cost in self.layers)

    @property
    def speed_correction(self) -> float:
        """Ratio of what is observed to what was profiled: a median, within MOST_CORRECTION."""
        ratios = [*NEUTRAL_OBSERVATIONS, *(seen.ratio for seen in self.observations)]
        return min(max(statistics.median(ratios), 1 / MOST_CORRECTION), MOST_CORRECTION)

    @property
    def overhead_seconds(self) -> float:
        """Seconds of a request beside those that the device works for it."""
        seen = [seen.overhead_seconds for seen in self.observations]
        return statistics.median(seen) if seen else self.request_seconds

    def latency_seconds(
        self, depth: Ints | int, rank: Ints | int, execution: Execution, workload: Workload
    ) -> Floats:
        """Median seconds of one batch as it is served; vectorised over depth and rank."""
        return np.asarray(self.latencies(depth, rank, execution, [workload])[0])

    def latencies(
        self,
        depth: Ints | int,
        rank: Ints | int,
        execution: Execution,
        workloads: Sequence[Workload],
    ) -> Floats:
        """The same of several workloads, (W, …)."""
        cost = self._cost(execution)
        plain = functools.cache(lambda rows: cost.step(depth, rank, rows))
        by_other = functools.cache(lambda n, guide: cost.guided_step(depth, rank, n, guide))
        of_steps = np.array(
            [
                [plain(w.n) for w in workloads],
                [by_other(w.n, w.guide) if w.guide else plain(2 * w.n) for w in workloads],
            ]
        )
        counts = np.array([(w.n, w.num_inference_steps, w.guided_steps) for w in workloads])
        images, steps, guided = counts.T.reshape(3, -1, *[1] * (of_steps.ndim - 2))
        stepping = (steps - guided) * of_steps[0] + guided * of_steps[1]
        working = images * self.image_seconds + stepping
        return np.asarray(self.overhead_seconds + working * self.speed_correction)

    def latency_estimated(self, execution: Execution) -> bool:
        return self._cost(execution).estimated

    def unlearned(self) -> "DeviceProfile":
        """This profile without what it has learned of latency."""
        return self.model_copy(update={"observations": (), "p95_ratio": FIRST_P95_RATIO})

    def corrected(
        self, predicted: Cost, measured: Cost, overhead_seconds: float | None, at: datetime
    ) -> "DeviceProfile":
        """This profile after a model was measured.

        Too little memory predicted raises a constant at once. `overhead_seconds`, those of
        `measured` in which the device did not work for it, is None where it was not measured
        undisturbed as it is served: of its latency nothing is learned then. Otherwise it counts
        among the last observations, and the ratio of the 95th percentile moves by a step that
        makes P95_MISSES of them too low.
        """
        more = max(0, measured.memory_bytes - predicted.memory_bytes)
        process_more = max(0, measured.process_memory_bytes - predicted.process_memory_bytes)
        learned: dict[str, object] = {
            "memory_overhead_bytes": self.memory_overhead_bytes + more,
            "process_base_bytes": self.process_base_bytes + max(0, process_more - more),
        }
        if overhead_seconds is not None:
            alone = (predicted.latency_seconds - self.overhead_seconds) / self.speed_correction
            worked = measured.latency_seconds - overhead_seconds
            seen = Observation(
                ratio=max(worked, 1e-9) / max(alone, 1e-9),
                overhead_seconds=overhead_seconds,
                at=at,
            )
            since = at - timedelta(days=OBSERVATION_DAYS)
            recent = (*(o for o in self.observations if o.at > since), seen)
            missed = measured.latency_p95_seconds > predicted.latency_p95_seconds
            tail = self.p95_ratio * np.exp(P95_STEP * (missed - P95_MISSES))
            learned |= {
                "observations": recent[-MOST_OBSERVATIONS:],
                "p95_ratio": float(np.clip(tail, *P95_RATIO_RANGE)),
            }
        return self.model_copy(update=learned)

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
