"""Requests and answers. An unknown field in a request is an error."""

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from learngenes.sizing.solver import Plan, Slack
from registry.datasets import Task
from registry.keys import Scope
from registry.records import (
    DEFAULT_TASK,
    Budget,
    Cost,
    Failure,
    FamilyRecord,
    ModelRecord,
    PlanRecord,
    Refinement,
    Verified,
    WorkerRecord,
)

MAX_SEED = 2**63 - 1
NAME = r"^[\w .-]{1,64}$"
MAX_REFINEMENT_SECONDS = 24 * 3600


def _encodable(text: str) -> str:
    text.encode()  # JSON can carry half a character; Redis and the answer cannot
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]


class PlanRequest(BaseModel):
    """A budget: max_mem_gb, max_latency_ms, or both; and for which sampling it holds."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"max_mem_gb": 4, "max_latency_ms": 800}, {"max_mem_gb": 0.004}]
        },
    )

    max_mem_gb: Annotated[Number, Field(gt=0, le=10_000)] | None = None
    """Of 10^9 bytes."""
    mem_scope: Literal["model", "process"] = "model"
    """Whether max_mem_gb bounds weights and peak activations, or the whole serving process."""
    max_latency_ms: Annotated[Number, Field(gt=0, le=86_400_000)] | None = None
    """The 95th percentile of one batch, on an idle device."""
    min_quality: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Of the family's best, which is 1."""
    n: Annotated[Count, Field(le=1024)] = 4
    """Images in one batch."""
    num_inference_steps: Annotated[Count, Field(le=1000)] = 25
    guidance_scale: Annotated[Number, Field(ge=1, le=20)] = 2.0
    """1 is unguided, and halves the rows of a step."""
    depth: Count | None = None
    rank: Count | None = None
    mode: Literal["factored", "materialised"] | None = None
    dtype: Literal["float32", "bfloat16", "int8"] | None = None
    family: Text | None = None
    """May be left out while there is only one."""
    device_class: Text | None = None
    """May be left out while there is only one."""

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.max_mem_gb is None and self.max_latency_ms is None:
            raise ValueError("send a budget: max_mem_gb, max_latency_ms, or both")
        if self.mem_scope == "process" and self.max_mem_gb is None:
            raise ValueError("mem_scope is about max_mem_gb: send that, too")
        return self

    @property
    def budget(self) -> Budget:
        return Budget.model_validate(self.model_dump(include=set(Budget.model_fields)))


class RefineRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    max_seconds: Annotated[Count, Field(le=MAX_REFINEMENT_SECONDS)]


class ModelRequest(PlanRequest):
    name: Annotated[str, Field(pattern=NAME)] | None = None
    task: Text = DEFAULT_TASK
    """A task's id: Σ and class embeddings are then retrained on its images instead of the family's
    own, and its classes are what the model samples."""
    refine: RefineRequest | None = None
    """Train every weight further, after Σ: the model then shares none with its family, so its
    mode is materialised."""

    @model_validator(mode="after")
    def _refinable(self) -> Self:
        if self.refine and self.mode == "factored":
            raise ValueError("a refined model has no factors: leave mode out, or leave refine out")
        if self.refine:
            self.mode = "materialised"
        return self


class PlanResponse(BaseModel):
    family: str
    device_class: str
    profiled_at: datetime
    plan: Plan
    binding: tuple[str, ...]
    """Constraints without which there were a better size; none: it is the family's best."""
    slack: Slack
    front: tuple[Plan, ...]
    """Sizes that no other beats in quality, memory and latency at once, best first."""


class ModelResponse(BaseModel):
    id: str
    name: str
    family: str
    device_class: str
    task: str
    class_names: list[str] | None
    """Of its task; None: the family's."""
    status: str
    revision: int | None
    budget: Budget
    refine: Refinement | None
    plan: PlanRecord
    measured: Cost | None
    over_budget: list[Verified]
    error: str | None
    created_at: datetime
    ready_at: datetime | None

    @classmethod
    def of(cls, record: ModelRecord) -> "ModelResponse":
        return cls.model_validate(record.model_dump(include=set(cls.model_fields)))


class ModelList(BaseModel):
    models: list[ModelResponse]
    next_offset: int | None


class FamilyList(BaseModel):
    families: list[FamilyRecord]


class TaskResponse(BaseModel):
    id: str
    name: str
    family: str
    class_names: list[str]
    counts: list[int]
    """Images of each class."""
    created_at: datetime

    @classmethod
    def of(cls, task: Task) -> "TaskResponse":
        return cls.model_validate(task.model_dump(exclude={"owner"}))


class TaskList(BaseModel):
    tasks: list[TaskResponse]


class GenerateRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"model": "m-…", "class_labels": ["Sneaker"], "n": 4}]},
    )

    model: Text
    class_labels: Annotated[list[int | Text], Field(min_length=1, max_length=1000)] | None = None
    """Names or numbers, repeated in turn over the `n` images; every class when left out."""
    n: Annotated[int, Field(ge=1)] | None = None
    """By default one image per class label."""
    num_inference_steps: Annotated[int, Field(ge=1)] = 25
    guidance_scale: Annotated[float, Field(ge=1, le=20, allow_inf_nan=False)] = 2.0
    """1 is unguided."""
    scheduler: Literal["ddim", "dpmsolver++", "euler"] = "ddim"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Image i has seed + i; drawn when left out."""
    format: Literal["png"] = "png"
    deadline_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    """After which nobody wants the images any more: it then fails, and takes no more time."""
    previews: bool = False
    """Whether progress events carry a small picture of the first image as it is by then."""


class ImageResponse(BaseModel):
    b64_png: str
    class_label: int
    seed: int


class Seconds(BaseModel):
    queued: float | None
    sampling: float | None


class GenerationResponse(BaseModel):
    id: str
    status: str
    model: str
    revision: int | None
    images: list[ImageResponse]
    seconds: Seconds
    error: str | None


class WorkerResponse(BaseModel):
    name: str
    """Host and process."""
    queue: str
    device_class: str
    torch_version: str
    families: list[str]
    gauges: dict[str, float]
    """As /metrics names them."""

    @classmethod
    def of(cls, worker: WorkerRecord) -> "WorkerResponse":
        return cls(name=worker.name, **worker.model_dump(exclude={"id"}))


class CallerResponse(BaseModel):
    key: str
    owner: str
    scopes: tuple[Scope, ...]


class Status(BaseModel):
    caller: CallerResponse | None
    """Whose key asked; None while there are no keys."""
    missing: list[str]
    """Why /readyz says no; empty when it says yes."""
    families: list[str]
    workers: list[WorkerResponse]
    queues: dict[str, int]
    """Messages that no worker has taken."""
    active_models: int
    active_generations: int
    failures: list[Failure]
    """The last ones, newest first."""
    redis_memory_bytes: int
    store_disk_free_bytes: int
    store_bytes: dict[str, int]
    """What artifacts take, by kind; counted every minute."""


class Snapshot(BaseModel):
    """An event of /status/events."""

    status: Status | None
    """None while Redis cannot be reached."""
    models: list[ModelResponse]
    """The newest."""
    images: dict[str, int]
    """Made by each model that made any, by id."""


class Readiness(BaseModel):
    ready: bool
    missing: list[str]
