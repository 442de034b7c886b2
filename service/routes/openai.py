"""/v1: the image API that OpenAI's clients speak; a prompt is a class, by name or number.

Parameters of that API that make no sense here are refused, not ignored.
"""

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fineserve.wire import Asked, GenerateRequest, Text
from learngenes.config import SamplingRequest
from registry.errors import RecordNotFound
from registry.records import FamilyRecord, GenerationRecord, ModelRecord
from service.access import Anybody, Caller, ModelDep, Sampler, visible
from service.deps import IdempotencyKey, State, StateDep
from service.generations import accept_generation, pictures_of, stay_for
from service.problems import Problem, unavailable
from service.serving import require_family

router = APIRouter(prefix="/v1", tags=["openai"])


ELASTIC_FIELDS = {"deadline_seconds", "min_quality", "when_late"}
MOST_NAMED = 5
"""Models that a refusal names."""


class ImagesRequest(Asked, SamplingRequest):
    """A request of OpenAI's image API; clients send `seed` and what follows as `extra_body`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "m-…", "prompt": "Sneaker", "n": 4}]},
    )

    @model_validator(mode="before")
    @classmethod
    def _said(cls, sent: Any) -> Any:
        """What was sent, but for what is null, which is as if it were left out."""
        return {k: v for k, v in sent.items() if v is not None} if isinstance(sent, dict) else sent

    model: Text
    """Id of a model; or a family, of which `deadline_seconds` chooses the size."""
    prompt: Text
    """Name or number of a class."""
    n: Annotated[int, Field(ge=1)] | None = None
    size: Text | None = None
    """`auto`, or WIDTHxHEIGHT of the model's family, which makes no other."""
    response_format: Literal["b64_json"] | None = None
    """Images come in the answer; there are no URLs to fetch them from."""
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    """Quality, which changes nothing: num_inference_steps does."""
    stream: Literal[False] | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    moderation: Literal["auto", "low"] | None = None
    """Moderation, which like the two before changes no image: a class has nothing to moderate."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    deadline_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    min_quality: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    when_late: Literal["smaller", "end"] | None = None
    """As POST /generate has these three."""


class ImageData(BaseModel):
    b64_json: str


class ImagesResponse(BaseModel):
    created: int
    """Seconds since 1970."""
    data: list[ImageData]
    output_format: str = "png"
    size: str


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str

    @classmethod
    def of(cls, record: ModelRecord) -> "OpenAIModel":
        created = int(record.created_at.timestamp())
        return cls(id=record.id, created=created, owned_by=record.owner or "fineserve")


class OpenAIModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


@router.post("/images/generations", response_model=ImagesResponse)
async def generate_images(
    request: ImagesRequest,
    connection: Request,
    state: StateDep,
    caller: Sampler,
    key: IdempotencyKey = None,
) -> Response:
    """Sample images of a class and wait for them."""
    family = await run_in_threadpool(_family, state, request)
    size = await run_in_threadpool(_check_size, state, request, caller, family)
    same = {"seed", *ELASTIC_FIELDS, *SamplingRequest.model_fields}
    ours = request.model_dump(include=same, exclude_none=True)
    ours |= {"model": request.model} if family is None else {"family": family.name}
    asked = GenerateRequest(class_labels=[request.prompt], n=request.n or 1, **ours)
    record = await run_in_threadpool(accept_generation, state, asked, key, caller)
    await stay_for(state, record, connection, may_leave=key is not None)
    return await run_in_threadpool(_answer, state, record.id, size)


def _family(state: State, request: ImagesRequest) -> FamilyRecord | None:
    """The family that a request asks in place of a model. Raises Problem without a deadline."""
    family = state.repository.family(request.model)
    if family is not None and request.deadline_seconds is None:
        raise Problem(
            422,
            "deadline-needed",
            f"{request.model} is a family: send deadline_seconds, by which its size is chosen, or "
            "a model's id",
            field="deadline_seconds",
        )
    return family


def _check_size(
    state: State, request: ImagesRequest, caller: Caller, family: FamilyRecord | None
) -> str:
    """Size of the images. Raises Problem when the request wants another."""
    family = family or require_family(state, _model(state, request.model, caller))
    side = family.network.image_size
    size = f"{side}x{side}"
    if request.size not in (None, "auto", size):
        raise Problem(
            422,
            "unsupported-size",
            f"size={request.size!r}: {request.model} makes images of {size}; send that, or auto",
            field="size",
        )
    return size


def _model(state: State, model_id: str, caller: Caller) -> ModelRecord:
    """Model of the caller. Raises Problem 404 that says which there are."""
    try:
        return visible(state.repository.models.get(model_id), caller)
    except RecordNotFound as error:
        page = state.repository.models.page(0, MOST_NAMED, caller.sees)
        there = ", ".join(record.id for record in page.items if record.servable)
        raise Problem(
            404,
            "model-not-found",
            f"{error}; GET /v1/models lists those there are: {there or 'none yet'}",
            field="model",
        ) from error


def _answer(state: State, generation_id: str, size: str) -> Response:
    record: GenerationRecord = state.repository.generations.get(generation_id)
    if not record.finished:
        raise unavailable(
            f"generation {record.id} is still {record.status}; GET /generations/{record.id} has "
            "its images later",
            "not-finished",
            {"X-Should-Retry": "false"},  # else their clients ask for others, from the beginning
        )
    pictures = pictures_of(state, record)
    images = [ImageData(b64_json=base64.b64encode(png).decode()) for png in pictures]
    created = int((record.finished_at or record.created_at).timestamp())
    return JSONResponse(ImagesResponse(created=created, data=images, size=size).model_dump())


@router.get("/models")
def list_models(state: StateDep, caller: Anybody) -> OpenAIModelList:
    """Models that images can be sampled from now, newest first."""
    every = state.repository.models.all(caller.sees)
    return OpenAIModelList(data=[OpenAIModel.of(record) for record in every if record.servable])


@router.get("/models/{model_id}")
def get_model(record: ModelDep, _: Anybody) -> OpenAIModel:
    if not record.servable:
        raise RecordNotFound(f"model {record.id} is {record.status}: GET /models/{record.id}")
    return OpenAIModel.of(record)
