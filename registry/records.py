"""Records and their state machines."""

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field


def now() -> datetime:
    return datetime.now(UTC)


DEFAULT_TASK = "default"
"""The family's own images; any other is an id."""
GIVEN_UP = {"failed", "cancelled", "deleted"}


class Record(BaseModel):
    """Something with a lifecycle. `status` changes only along `TRANSITIONS`."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # of a later release, say

    NAME: ClassVar[str]
    ID_PREFIX: ClassVar[str]
    TRANSITIONS: ClassVar[dict[str, set[str]]]
    FINISHED: ClassVar[set[str]]
    """States in which nothing is under way."""
    STARTED: ClassVar[str]
    """The state that a worker's claim leads to."""

    id: str
    status: str
    owner: str = ""
    """Who sees it: whoever has a key of that owner. Owners share a busy device evenly."""
    attempts: int = 0
    """How often a worker has begun; capped here and not by the broker."""
    error: str | None = None
    problem: str | None = None
    """The kind of error, where the caller should be told more than that it failed."""
    created_at: datetime = Field(default_factory=now)

    @classmethod
    def new_id(cls) -> str:
        return f"{cls.ID_PREFIX}-{secrets.token_hex(8)}"

    @property
    def finished(self) -> bool:
        return self.status in self.FINISHED

    def replace(self, **changes: Any) -> Self:
        """A validated copy."""
        return type(self).model_validate({**self.model_dump(), **changes})


class ModelStatus(StrEnum):
    QUEUED = "queued"
    ASSEMBLING = "assembling"
    RETRAINING = "retraining"
    REFINING = "refining"
    VERIFYING = "verifying"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"


class Cost(BaseModel):
    """What a size costs, predicted or measured."""

    memory_bytes: int
    """Weights and peak activations of one batch."""
    process_memory_bytes: int
    """The whole of a process that serves this one model."""
    latency_seconds: float
    """Median of one batch."""
    latency_p95_seconds: float


class PlanRecord(BaseModel):
    depth: int
    rank: int
    mode: str
    dtype: str
    n: int
    """Images in one batch."""
    predicted: Cost
    quality: float
    """Of the family's best, which is 1."""


class Verified(BaseModel):
    """A plan that was built, and what it was measured to cost."""

    plan: PlanRecord
    measured: Cost


class Budget(BaseModel):
    """What the caller can afford, for which sampling, and what is fixed."""

    max_mem_gb: float | None = None
    mem_scope: Literal["model", "process"] = "model"
    max_latency_ms: float | None = None
    min_quality: float | None = None
    n: int = 4
    num_inference_steps: int = 25
    guidance_scale: float = 2.0
    depth: int | None = None
    rank: int | None = None
    mode: str | None = None
    dtype: str | None = None


class Refinement(BaseModel):
    """A wish: every W trained further, after Sigma."""

    max_seconds: int
    stopped: bool = False
    """Whether the caller wants no more of it: the best so far is taken."""


class ModelRecord(Record):
    NAME = "model"
    ID_PREFIX = "m"
    TRANSITIONS = {
        "queued": {"assembling"} | GIVEN_UP,
        "assembling": {"assembling", "retraining", "refining"} | GIVEN_UP,
        "retraining": {"assembling", "verifying"} | GIVEN_UP,
        "refining": {"assembling", "verifying", "ready"} | GIVEN_UP,
        "verifying": {"assembling", "retraining", "refining", "ready"} | GIVEN_UP,
        "ready": {"deleted"},
        "failed": {"deleted"},
        "cancelled": {"deleted"},
        "deleted": set(),
    }
    FINISHED = {"ready", "failed", "cancelled", "deleted"}
    STARTED = "assembling"

    name: str
    family: str
    device_class: str
    task: str = DEFAULT_TASK
    class_names: list[str] | None = None
    """Of another task; None is the family's."""
    status: ModelStatus = ModelStatus.QUEUED
    revision: int | None = None
    """None until there is something to sample from; 0 interpolated Sigma, 1 retrained, 2 refined.
    Three more for each time that a model was over its budget and a smaller one was made."""
    budget: Budget
    refine: Refinement | None = None
    plan: PlanRecord
    measured: Cost | None = None
    over_budget: list[Verified] = []
    """What was tried before `plan` and measured to need too much."""
    ready_at: datetime | None = None

    @property
    def refinement_begun(self) -> bool:
        """Whether it is under way, and the model it begins with is served and measured."""
        return self.refine is not None and self.measured is not None and not self.finished

    @property
    def servable(self) -> bool:
        """A revision is served while the next one is still being made."""
        return self.revision is not None and self.status not in ("failed", "cancelled", "deleted")


class GenerationStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class GenerationRecord(Record):
    NAME = "generation"
    ID_PREFIX = "g"
    TRANSITIONS = {
        "queued": {"running", "failed", "cancelled"},
        "running": {"running", "done", "failed", "cancelled"},
        "done": set(),
        "failed": set(),
        "cancelled": set(),
    }
    FINISHED = {"done", "failed", "cancelled"}
    STARTED = "running"

    status: GenerationStatus = GenerationStatus.QUEUED
    model: str
    device_class: str
    revision: int | None = None
    class_labels: list[int]
    """One per image."""
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    previews: bool = False
    deadline: datetime | None = None
    """After it nobody wants the images any more."""
    started_at: datetime | None = None
    """When the engine got it; `finished_at`, when it had the images."""
    finished_at: datetime | None = None


class Failure(BaseModel):
    """What an operator is told of a record that failed."""

    kind: str
    id: str
    error: str
    at: datetime


class FamilyRecord(BaseModel):
    """What workers announce of a family they hold; shapes as in its family.json."""

    name: str
    network: dict[str, Any]
    sizes: dict[str, list[int]]
    class_names: list[str]
    licence: str
    trained_steps: int
    fingerprint: str
    """Changes with the weights."""
    quality: dict[str, Any] | None
    """Its quality table; None until it is calibrated."""


class WorkerRecord(BaseModel):
    """A worker's heartbeat."""

    id: str
    queue: str
    device_class: str
    torch_version: str
    families: list[str]
    gauges: dict[str, float] = {}
    """By the names in registry.metrics.WORKER_GAUGES."""

    @property
    def name(self) -> str:
        """Host and process."""
        return self.id.rpartition(":")[0]
