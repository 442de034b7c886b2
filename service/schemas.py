"""Requests and answers. An unknown field in a request is an error."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.records import Budget, FamilyRecord, Measured, ModelRecord, PlanRecord

MAX_SEED = 2**63 - 1


class ModelRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"max_mem_gb": 4}, {"max_mem_gb": 0.004}]}
    )

    max_mem_gb: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)]
    """What the model itself may need on the device, in GB of 10^9 bytes."""
    n: Annotated[int, Field(ge=1, le=128)] = 4
    """Images in one batch, for which the budget holds."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    family: str | None = None
    """May be left out while there is only one."""
    name: Annotated[str, Field(pattern=r"^[\w .-]{1,64}$")] | None = None


class ModelResponse(BaseModel):
    id: str
    name: str
    family: str
    task: str
    status: str
    revision: int | None
    budget: Budget
    plan: PlanRecord
    measured: Measured
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


class GenerateRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"model": "m-…", "class_labels": ["Sneaker"], "n": 4}]},
    )

    model: str
    class_labels: Annotated[list[int | str], Field(min_length=1, max_length=1000)] | None = None
    """Names or numbers, repeated in turn over the `n` images; every class when left out."""
    n: Annotated[int, Field(ge=1)] | None = None
    """By default one image per class label."""
    num_inference_steps: Annotated[int, Field(ge=1)] = 25
    guidance_scale: Annotated[float, Field(ge=1, le=20, allow_inf_nan=False)] = 2.0
    """1 is unguided."""
    scheduler: Literal["ddim", "dpmsolver++"] = "ddim"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Image i has seed + i; drawn when left out."""
    format: Literal["png"] = "png"


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


class Readiness(BaseModel):
    ready: bool
    missing: list[str]
