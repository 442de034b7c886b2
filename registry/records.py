"""Records and their state machines."""

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fineserve.wire import DEFAULT_TASK, Elastic, Family, Refinement, Served
from learngenes.config import Sampling, SamplingRequest
from learngenes.sizing.budget import Budget, Cost, Plan, Training, Verified
from learngenes.sizing.quality import QualityTable

log = structlog.get_logger()

M = TypeVar("M", bound=BaseModel)


def now() -> datetime:
    return datetime.now(UTC)


def readable(kind: type[M], raw: str) -> M | None:
    """Content of some JSON; None, and logged, where another release wrote it differently."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        log.error("a record cannot be read", kind=kind.__name__, raw=raw[:200], error=str(error))
        return None


GIVEN_UP = {"failed", "cancelled", "deleted"}
REFUSED = "refused"
"""Problem of a request that could not be served in time: no failure."""


class Record(BaseModel):
    """A piece of work with a lifecycle; `status` changes only along `TRANSITIONS`."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later release wrote it, say

    NAME: ClassVar[str]
    ID_PREFIX: ClassVar[str]
    TRANSITIONS: ClassVar[dict[str, set[str]]]
    FINISHED: ClassVar[set[str]]
    """States in which nothing is under way."""
    STARTED: ClassVar[str]
    """State that a worker's claim leads to."""

    id: str
    status: str
    owner: str = ""
    """Whose keys see the record. Owners share a busy device evenly."""
    attempts: int = 0
    """Number of times that a worker has begun; capped here and not by the broker."""
    error: str | None = None
    problem: str | None = None
    """Kind of error, where the caller should be told more than that the work failed."""
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
    UNDERTRAINED = "undertrained"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"


class ModelRecord(Record):
    NAME = "model"
    ID_PREFIX = "m"
    TRANSITIONS = {
        "queued": {"assembling"} | GIVEN_UP,
        "assembling": {"assembling", "retraining", "verifying", "refining"} | GIVEN_UP,
        "retraining": {"assembling", "verifying", "undertrained"} | GIVEN_UP,
        "refining": {"assembling", "verifying", "ready"} | GIVEN_UP,
        "verifying": {"assembling", "retraining", "verifying", "refining", "ready"} | GIVEN_UP,
        "undertrained": {"queued", "deleted"},
        "ready": {"deleted"},
        "failed": {"deleted"},
        "cancelled": {"deleted"},
    }
    FINISHED = {"ready", "undertrained"} | GIVEN_UP
    STARTED = "assembling"

    name: str
    family: str
    device_class: str
    task: str = DEFAULT_TASK
    class_names: list[str] | None = None
    """Classes of another task; None is the family's."""
    status: ModelStatus = ModelStatus.QUEUED
    revision: int | None = None
    """Number of what is served, None for nothing: 0 has the family's Sigma, 1 retrained, 2 refined;
    three more for each time that a model was over its budget and a smaller one was made."""
    artifact: str | None = None
    """Directory of that revision among the model's in the store, named for its plan and bytes too;
    None is `revision-N`, which earlier releases wrote."""
    budget: Budget
    refine: Refinement | None = None
    elastic: Elastic | None = None
    plan: Plan
    training: Training | None = None
    """What was done for its Sigma; None until that is known, and in older records."""
    continued: int = 0
    """Number of times that training was given its time again."""
    measured: Cost | None = None
    disturbed: str = ""
    """What disturbed the measurement of latency, which is not to be relied on then."""
    over_budget: list[Verified] = []
    """Plans before `plan` that were measured to need too much."""
    ready_at: datetime | None = None

    @property
    def refinement_begun(self) -> bool:
        """Whether refinement is under way: the model that it begins with is served and measured."""
        return self.refine is not None and self.measured is not None and not self.finished

    @property
    def servable(self) -> bool:
        """Whether images can be sampled, also while the next revision is still being made."""
        return self.revision is not None and self.status not in GIVEN_UP


class GenerationStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Terms(BaseModel):
    """What the caller of an elastic request allows."""

    asked: SamplingRequest
    """What was said of the sampling, which is never changed."""
    due: datetime | None
    """Time by which the images are to be there; None where a model alone is elastic."""
    seconds: float | None
    """The same from the request's arrival: what is left is never more, whatever a clock says."""
    min_quality: float = 0.0
    when_late: Literal["smaller", "end"] = "smaller"


class GenerationRecord(Sampling, Record):
    NAME = "generation"
    ID_PREFIX = "g"
    TRANSITIONS = {
        "queued": {"running", "failed", "cancelled"},
        "running": {"running", "done", "failed", "cancelled"},
    }
    FINISHED = {"done", "failed", "cancelled"}
    STARTED = "running"

    status: GenerationStatus = GenerationStatus.QUEUED
    model: str
    """Id of a model; the name of the family where none was asked."""
    family: str | None = None
    """Family of an elastic request that asks no model."""
    elastic: Terms | None = None
    served: Served | None = None
    """By what an elastic request was served, once it is."""
    retry_seconds: int | None = None
    """Seconds until what was refused may be asked for again."""
    device_class: str
    revision: int | None = None
    class_labels: list[int]
    """Class number of each image."""
    seeds: list[int]
    previews: bool = False
    timed: bool = False
    """Whether it is made only to be timed."""
    deadline: datetime | None = None
    """Time after which nobody wants the images any more."""
    started_at: datetime | None = None
    """Time at which the engine got the request."""
    finished_at: datetime | None = None
    """Time at which the engine had the images."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class FamilyRecord(Family):
    """A family as workers announce it."""

    quality: QualityTable | None
    """Quality table of the family; None until it is calibrated."""


class WorkerRecord(BaseModel):
    """Heartbeat of a worker."""

    id: str
    queue: str
    device_class: str
    torch_version: str
    families: list[str]
    gauges: dict[str, float] = {}
    """Values by the names in registry.metrics.WORKER_GAUGES."""
    problem: str = ""
    """What keeps the worker from working as it should; empty where nothing does."""

    @property
    def name(self) -> str:
        """Host and process."""
        return self.id.rpartition(":")[0]
