"""The types of the HTTP API: requests and answers. An unknown field in a request is an error.

Service and client are made of them, and neither torch nor the rest of the service is needed.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from learngenes.config import Mode, NetworkConfig, Sampling, SamplingRequest, SizeSpace
from learngenes.sizing.budget import Budget, Cost, Plan, Slack, Training, Verified

DEFAULT_TASK = "default"
"""Task of the family's own images; any other is a task's id."""
MAX_SEED = 2**63 - 1
NAME = r"^[\w .-]{1,64}$"
MAX_REFINEMENT_SECONDS = 24 * 3600


def _encodable(text: str) -> str:
    text.encode()  # JSON can carry half a character; Redis and the answer cannot
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class PlanRequest(Budget):
    """Budget: max_mem_gb, max_latency_ms, or both; and the sampling for which it holds."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"max_mem_gb": 4, "max_latency_ms": 800}, {"max_mem_gb": 0.004}]
        },
    )

    family: Text | None = None
    """Family; may be left out while there is only one."""
    device_class: Text | None = None
    """Device class; may be left out while there is only one."""

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

    max_seconds: Annotated[int, Field(ge=1, le=MAX_REFINEMENT_SECONDS, strict=True)]


class Refinement(BaseModel):
    """Wish to train every W further, after Sigma."""

    max_seconds: int
    stopped: bool = False
    """Whether the caller wants no more of it: the best so far is taken."""


class ModelRequest(PlanRequest):
    name: Annotated[str, Field(pattern=NAME)] | None = None
    task: Text = DEFAULT_TASK
    """Id of a task: Σ and class embeddings are then retrained on its images instead of the family's
    own, and its classes are what the model samples."""
    refine: RefineRequest | None = None
    """Train every weight further, after Σ: the model then shares none with its family, so its
    mode is materialised unless it is dense."""

    @model_validator(mode="after")
    def _refinable(self) -> Self:
        if self.refine and self.mode is Mode.FACTORED:
            raise ValueError("a refined model has no factors: leave mode out, or leave refine out")
        if self.refine and self.mode is None:
            self.mode = Mode.MATERIALISED
        return self


class Answer(BaseModel):
    """Part of a record that its owner is told."""

    model_config = ConfigDict(from_attributes=True)


class PlanResponse(BaseModel):
    family: str
    device_class: str
    profiled_at: datetime
    plan: Plan
    binding: tuple[str, ...]
    """Constraints without which a better size would exist; none for the family's best."""
    slack: Slack
    front: tuple[Plan, ...]
    """Sizes that no other beats in quality, memory and latency at once, best first."""


class ModelResponse(Answer):
    id: str
    name: str
    family: str
    device_class: str
    task: str
    class_names: list[str] | None
    """Class names of its task; None for the family's."""
    status: str
    revision: int | None
    budget: Budget
    refine: Refinement | None
    plan: Plan
    training: Training | None = None
    """What was done for its Σ, and what ended that; None until then."""
    measured: Cost | None
    disturbed: str = ""
    """What disturbed the measurement of latency, which is not to be relied on then; empty for
    nothing."""
    over_budget: list[Verified]
    error: str | None
    created_at: datetime
    ready_at: datetime | None


class ModelList(BaseModel):
    models: list[ModelResponse]
    next_offset: int | None


class Family(Answer):
    """A family that workers hold; shapes as in its family.json."""

    name: str
    network: NetworkConfig
    sizes: SizeSpace
    class_names: list[str]
    licence: str
    trained_steps: int
    fingerprint: str
    """Digest of the weights."""


class FamilyResponse(Family):
    """Family that workers hold; shapes as in its family.json."""

    quality: dict[str, Any] | None
    """Quality table; None until the family is calibrated."""


class FamilyList(BaseModel):
    families: list[FamilyResponse]


class SkippedResponse(BaseModel):
    reason: str
    count: int
    examples: list[str]
    """Paths of the first of them."""


class TaskResponse(Answer):
    id: str
    name: str
    family: str
    class_names: list[str]
    counts: list[int]
    """Number of images of each class."""
    skipped: list[SkippedResponse] = []
    """Files of the upload that are not in it, and why."""
    created_at: datetime


class TaskList(BaseModel):
    tasks: list[TaskResponse]


class GenerateRequest(SamplingRequest):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"model": "m-…", "class_labels": ["Sneaker"], "n": 4}]},
    )

    model: Text
    class_labels: Annotated[list[int | Text], Field(min_length=1, max_length=1000)] | None = None
    """Class names or numbers, repeated in turn over the `n` images; by default every class."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Number of images; by default one per class label."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Seed of the first image; image i has seed + i. By default it is drawn."""
    format: Literal["png"] = "png"
    deadline_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    """Seconds after which nobody wants the images any more: the generation then fails."""
    previews: bool = False
    """Whether progress events carry a small picture of the first image as it is by then."""


class ExportFormat(StrEnum):
    """Format in which a model is exported."""

    DIFFUSERS = "diffusers"
    """Directory for plain diffusers: every W written out, in float32."""
    ONNX = "onnx"
    """The same network for ONNX runtimes."""
    NATIVE = "native"
    """U, V of the model's rank, its Sigma and the stem: what `learngenes` loads by itself."""
    ADAPTER = "adapter"
    """Parameters of the model's own alone; `learngenes` adds the family."""


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
    sampling: Sampling | None = None
    """How the images are sampled: what was asked for, and what the model's plan says of the rest.
    None from services that do not tell."""
    images: list[ImageResponse]
    seconds: Seconds
    error: str | None


class WorkerResponse(Answer):
    name: str
    """Host and process of the worker."""
    queue: str
    device_class: str
    torch_version: str
    families: list[str]
    gauges: dict[str, float]
    """Values by the names that /metrics gives them."""
    problem: str = ""
    """What keeps the worker from working as it should, uncompiled kernels for instance; empty
    where nothing does."""


class ProfileResponse(BaseModel):
    """What is known of a family's speed on a class of device."""

    family: str
    device_class: str
    measured_at: datetime
    estimated: bool
    """Whether some latencies are estimates: the device was not idle yet."""
    observations: int
    """Number of models, measured as they are served, that correct it."""
    speed_correction: float
    """Ratio of what they took to what the device was measured to take."""
    overhead_seconds: float
    """Seconds of a request beside those that the device works for it."""


class CallerResponse(BaseModel):
    key: str
    owner: str
    scopes: tuple[str, ...]


class Failure(BaseModel):
    """Failed record, as an operator is told."""

    kind: str
    id: str
    error: str
    at: datetime


class Status(BaseModel):
    caller: CallerResponse | None
    """Owner of the key that asked; None while there are no keys."""
    missing: list[str]
    """Reasons why /readyz says no; empty when it says yes."""
    families: list[str]
    workers: list[WorkerResponse]
    profiles: list[ProfileResponse] = []
    queues: dict[str, int]
    """Number of messages in each queue that no worker has taken."""
    active_models: int
    active_generations: int
    failures: list[Failure]
    """Last failures, newest first."""
    redis_memory_bytes: int
    store_disk_free_bytes: int
    store_bytes: dict[str, int]
    """Bytes of artifacts, by kind; counted every minute."""


class Snapshot(BaseModel):
    """Event of /status/events."""

    status: Status | None
    """Status; None while Redis cannot be reached."""
    models: list[ModelResponse]
    """Newest models."""
    images: dict[str, int]
    """Number of images by the id of the model that made them."""


class Readiness(BaseModel):
    ready: bool
    missing: list[str]
