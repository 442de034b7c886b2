"""The words of sizing: what a caller can afford, what a size costs, and the plan that is chosen.

Neither numpy nor torch here: the service's HTTP types and its clients are made of these.
"""

import functools
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from learngenes.config import DType, Frozen, Mode, Sampling, SamplingRequest, Size

MemoryScope = Literal["model", "process"]
LatencyPercentile = Literal[50, 95]
"""Percentiles that are predicted, and that the few requests of a measurement can tell."""
BudgetName = Literal["max_mem_gb", "max_latency_ms", "min_quality"]

Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True)
class Workload:
    """The sampling that a budget is stated for."""

    n: int = 4
    """Images in one batch."""
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, n: int = 4, **sampling: Any) -> "Workload":
        """The workload of a sampling that is stated by its fields."""
        return cls(n, Sampling(**sampling))

    @property
    def num_inference_steps(self) -> int:
        return self.sampling.num_inference_steps

    @functools.cached_property
    def guided_steps(self) -> int:
        return len(self.sampling.guided)

    @property
    def guide(self) -> Size | None:
        """Smaller size that guides in some of the steps."""
        return self.sampling.guide if self.guided_steps else None

    @property
    def rows(self) -> int:
        """Most rows of a step: a guided image needs a second one."""
        return self.n * (2 if self.guided_steps else 1)

    @property
    def rows_of_an_image(self) -> int:
        """Rows of all steps of one image."""
        return self.num_inference_steps + self.guided_steps


class Constraints(Frozen):
    """A budget in bytes and seconds, and what is fixed; None where it does not matter."""

    max_mem_bytes: Annotated[int, Field(ge=0)] | None = None
    mem_scope: MemoryScope = "model"
    max_latency_seconds: PositiveFloat | None = None
    latency_percentile: LatencyPercentile = 95
    min_quality: Annotated[float, Field(gt=0, le=1)] | None = None
    depth: PositiveInt | None = None
    rank: PositiveInt | None = None
    mode: Mode | None = None
    dtype: DType | None = None


class Budget(SamplingRequest):
    """What the caller can afford, for which sampling, and what is fixed."""

    max_mem_gb: Annotated[Number, Field(gt=0, le=10_000)] | None = None
    """Memory, in units of 10^9 bytes."""
    mem_scope: MemoryScope = "model"
    """Whether max_mem_gb bounds weights and peak activations, or the whole serving process."""
    max_latency_ms: Annotated[Number, Field(gt=0, le=86_400_000)] | None = None
    """Latency of one batch, on an idle device."""
    latency_percentile: LatencyPercentile = 95
    """Share of the batches, in percent, that max_latency_ms holds for: 50 is the median."""
    min_quality: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Least quality, as plans state it."""
    n: Annotated[Count, Field(le=1024)] = 4
    """Images in one batch."""
    num_inference_steps: Annotated[Count, Field(le=1000)] | None = None
    depth: Count | None = None
    rank: Count | None = None
    mode: Mode | None = None
    dtype: DType | None = None

    @property
    def constraints(self) -> Constraints:
        """In bytes and seconds: a GB is 10^9 bytes."""
        gigabytes, milliseconds = self.max_mem_gb, self.max_latency_ms
        same = {"mem_scope", "latency_percentile", "min_quality", "depth", "rank", "mode", "dtype"}
        return Constraints(
            max_mem_bytes=None if gigabytes is None else round(gigabytes * 1e9),
            max_latency_seconds=None if milliseconds is None else max(milliseconds / 1e3, 1e-9),
            **self.model_dump(include=same),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """What a size costs, predicted or measured."""

    memory_bytes: int
    """Weights and peak activations of one batch."""
    process_memory_bytes: int
    """The whole of a process that serves this one model."""
    latency_seconds: float
    """Median of one batch."""
    latency_p95_seconds: float

    def scoped_memory_bytes(self, scope: MemoryScope) -> int:
        return self.process_memory_bytes if scope == "process" else self.memory_bytes

    def percentile_seconds(self, percentile: LatencyPercentile) -> float:
        """Seconds that so many of 100 batches keep."""
        return self.latency_seconds if percentile == 50 else self.latency_p95_seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """One size, and what it is predicted to cost and to be worth."""

    depth: int
    rank: int
    mode: Mode
    dtype: DType
    n: int
    """Images in one batch: what the budget was stated for."""
    predicted: Cost
    quality: float
    """Share of the way from the family's worst pictures to real ones, of those that show what was
    asked for; where nobody has measured pictures, the family's least loss over this size's."""
    latency_estimated: bool = False
    """Whether latency is an estimate: the device has not been measured idle yet."""
    latency_range_seconds: tuple[float, float] | None = None
    """Range in which the measured median lies for nine sizes of ten; None in older records."""
    sampling: Sampling | None = None
    """Sampling that it is for, and that requests get by default; None in older records."""
    distance: float | None = None
    """Fréchet distance of its pictures to real ones; None where nobody has measured it."""
    class_accuracy: float | None = None
    """Share of its pictures in which a classifier finds the class that was asked for."""

    @property
    def workload(self) -> Workload:
        return Workload(self.n, self.sampling or Sampling())

    @property
    def constraints(self) -> Constraints:
        """What only this size keeps."""
        return Constraints(depth=self.depth, rank=self.rank, mode=self.mode, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Verified:
    """A plan that was built, and what it was measured to cost."""

    plan: Plan
    measured: Cost


@dataclass(frozen=True, slots=True)
class Training:
    """What was done for a model's Sigma, or for its imported layers."""

    steps: int
    most_steps: int
    seconds: float
    stopped: str
    """`prepared`: the family holds it; `random`: its weights are random numbers, which learn
    nothing; `converged`, `steps`, `time`: what ended it."""
    heldout_loss_before: float | None = None
    heldout_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Slack:
    """What of the budget is left; None where there was none."""

    memory_bytes: int | None
    latency_seconds: float | None
