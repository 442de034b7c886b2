"""Records and their state machines."""

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field


def now() -> datetime:
    return datetime.now(UTC)


class Record(BaseModel):
    """Something with a lifecycle. `status` changes only along `TRANSITIONS`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    NAME: ClassVar[str]
    ID_PREFIX: ClassVar[str]
    TRANSITIONS: ClassVar[dict[str, set[str]]]
    FINISHED: ClassVar[set[str]]
    """States in which nothing is under way."""
    STARTED: ClassVar[str]
    """The state that a worker's claim leads to."""

    id: str
    status: str
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
    VERIFYING = "verifying"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"


class Predicted(BaseModel):
    memory_bytes: int
    latency_seconds: float | None


class PlanRecord(BaseModel):
    depth: int
    rank: int
    mode: str
    dtype: str
    n: int
    predicted: Predicted


class Measured(BaseModel):
    memory_bytes: int | None = None
    latency_p95_seconds: float | None = None


class Budget(BaseModel):
    max_mem_gb: float
    n: int
    num_inference_steps: int


class ModelRecord(Record):
    NAME = "model"
    ID_PREFIX = "m"
    TRANSITIONS = {
        "queued": {"assembling", "failed", "cancelled", "deleted"},
        "assembling": {"assembling", "retraining", "failed", "cancelled", "deleted"},
        "retraining": {"assembling", "verifying", "failed", "cancelled", "deleted"},
        "verifying": {"assembling", "ready", "failed", "cancelled", "deleted"},
        "ready": {"deleted"},
        "failed": {"deleted"},
        "cancelled": {"deleted"},
        "deleted": set(),
    }
    FINISHED = {"ready", "failed", "cancelled", "deleted"}
    STARTED = "assembling"

    name: str
    family: str
    task: str = "default"
    status: ModelStatus = ModelStatus.QUEUED
    revision: int | None = None
    """None until there is something to sample from; 0 interpolated Sigma, 1 retrained."""
    budget: Budget
    plan: PlanRecord
    measured: Measured = Measured()
    ready_at: datetime | None = None

    @property
    def servable(self) -> bool:
        """Revision 0 is served while revision 1 is still being made."""
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
    revision: int | None = None
    class_labels: list[int]
    """One per image."""
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    started_at: datetime | None = None
    finished_at: datetime | None = None


class FamilyRecord(BaseModel):
    """What workers announce of a family they hold; shapes as in its family.json."""

    name: str
    network: dict[str, int]
    sizes: dict[str, list[int]]
    class_names: list[str]
    licence: str
    trained_steps: int
    flops_per_second: float
    """Measured by the worker at start, at the family's full size."""


class WorkerRecord(BaseModel):
    """A worker's heartbeat."""

    id: str
    queue: str
    device: str
    families: list[str]
