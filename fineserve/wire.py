"""The types of the HTTP API: requests and answers. An unknown field in a request is an error.

Service and client are made of them, and neither torch nor the rest of the service is needed.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from learngenes.config import Mode, NetworkConfig, Sampling, SamplingRequest, Size, SizeSpace
from learngenes.sizing.budget import Budget, Cost, Plan, Slack, Training, Verified

DEFAULT_TASK = "default"
"""Task of the family's own images; any other is a task's id."""
MAX_SEED = 2**63 - 1
MOST_FIELDS = 100
"""Fields of a request that are looked at one by one: to explain thousands takes a processor."""
NAME = r"^[\w .-]{1,64}$"
MAX_REFINEMENT_SECONDS = 24 * 3600


def _encodable(text: str) -> str:
    text.encode()  # JSON can carry half a character; Redis and the answer cannot
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class Asked(BaseModel):
    """A request, all of whose fields are known."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, sent: Any) -> Any:
        if isinstance(sent, dict) and len(sent) > MOST_FIELDS:
            raise ValueError(f"{len(sent)} fields, where no request has {MOST_FIELDS}: send fewer")
        return sent


class PlanRequest(Asked, Budget):
    """Budget: max_mem_gb, max_latency_ms, or both; and the sampling for which it holds."""

    model_config = ConfigDict(
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
        if self.latency_percentile != 95 and self.max_latency_ms is None:
            raise ValueError("latency_percentile is about max_latency_ms: send that, too")
        return self

    @property
    def budget(self) -> Budget:
        return Budget.model_validate(self.model_dump(include=set(Budget.model_fields)))


class RefineRequest(Asked):
    max_seconds: Annotated[int, Field(ge=1, le=MAX_REFINEMENT_SECONDS, strict=True)]


class Refinement(BaseModel):
    """Wish to train every W further, after Sigma."""

    max_seconds: int
    stopped: bool = False
    """Whether the caller wants no more of it: the best so far is taken."""


class Elastic(Asked):
    """Leave to serve a model's requests by smaller sizes while there is much to do."""

    min_quality: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    """Least quality, as plans state it, however much there is to do."""


class ModelRequest(PlanRequest):
    name: Annotated[str, Field(pattern=NAME)] | None = None
    task: Text = DEFAULT_TASK
    """Id of a task: Σ and class embeddings are then retrained on its images instead of the family's
    own, and its classes are what the model samples."""
    refine: RefineRequest | None = None
    """Train every weight further, after Σ: the model then shares none with its family, so its
    mode is materialised unless it is dense."""
    elastic: Elastic | None = None
    """Serve its requests by smaller sizes of its family while there is much to do."""

    @model_validator(mode="after")
    def _refinable(self) -> Self:
        if self.refine and self.mode is Mode.FACTORED:
            raise ValueError("a refined model has no factors: leave mode out, or leave refine out")
        if self.refine and self.mode is None:
            self.mode = Mode.MATERIALISED
        if self.elastic and (self.refine or self.task != DEFAULT_TASK):
            raise ValueError(
                "no other size knows what a refined model or a task has learned: leave elastic "
                "out, or make the model without"
            )
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
    elastic: Elastic | None = None
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


class GenerateRequest(Asked, SamplingRequest):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "m-…", "class_labels": ["Sneaker"], "n": 4},
                {"family": "fashion", "class_labels": ["Sneaker"], "deadline_seconds": 0.5},
            ]
        },
    )

    model: Text | None = None
    """Id of a model; or leave it out, and name a family."""
    family: Text | None = None
    """Family: the service then chooses, for this one request, the best size (and what of the
    sampling is left open) whose images are there within `deadline_seconds`."""
    size: Literal["auto"] | None = None
    """Size of a family's request, which is always chosen by the service."""
    min_quality: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Least quality, as plans state it, of an elastic request."""
    when_late: Literal["smaller", "end"] = "smaller"
    """What happens to an elastic request whose promise can no longer be kept: its last steps are
    made by a smaller size, and it comes late if that does not help; or it ends."""
    class_labels: Annotated[list[int | Text], Field(min_length=1, max_length=1000)] | None = None
    """Class names or numbers, repeated in turn over the `n` images; by default every class."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Number of images; by default one per class label."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Seed of the first image; image i has seed + i. By default it is drawn."""
    format: Literal["png"] = "png"
    deadline_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    """Seconds from now in which the images are to be there. Of an elastic request it is a promise,
    or a refusal at once; for any other nobody wants them afterwards: the generation then fails."""
    previews: bool = False
    """Whether progress events carry a small picture of the first image as it is by then."""

    @model_validator(mode="after")
    def _of_a_model_or_a_family(self) -> Self:
        if (self.model is None) == (self.family is None):
            raise ValueError("send a model's id, or a family and deadline_seconds")
        if self.family is not None and self.deadline_seconds is None:
            raise ValueError(
                "send deadline_seconds: the best size of a family is chosen that is there by then"
            )
        if self.size is not None and self.family is None:
            raise ValueError("a model has its size already: leave size out, or send a family")
        return self


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


class Served(BaseModel):
    """By what an elastic request was served, and what was promised of it."""

    size: Size
    quality: float
    """Quality of that size by that sampling, as plans state it."""
    best_quality: float
    """Quality that it would have had at best."""
    promised_seconds: float | None
    """Seconds from the request's arrival in which its images were promised; None for a model's
    request that named no deadline."""
    foreseen_seconds: float
    """The same in which they were foreseen."""
    took_seconds: float
    """Seconds from its arrival until they were there."""
    estimated: bool = False
    """Whether the device had not been measured yet, and more room was left for what may go wrong.
    """
    finished_by: Size | None = None
    """Smaller size that made the last steps; None where none had to."""


class GenerationResponse(BaseModel):
    id: str
    status: str
    model: str
    """Model that was asked, or the family of an elastic request."""
    revision: int | None
    sampling: Sampling | None = None
    """How the images are sampled: what was asked for, and what the model's plan says of the rest.
    None from services that do not tell."""
    images: list[ImageResponse]
    seconds: Seconds
    elastic: Served | None = None
    """Of an elastic request by what it was served; None until it is done."""
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
