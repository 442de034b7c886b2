"""/generate and /generations: images that a model samples."""

import base64
import contextlib
import io
import math
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from PIL import Image
from redis import RedisError
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header, parse_dict_header

from fineserve.wire import GenerateRequest, GenerationResponse, ImageResponse, Seconds
from learngenes.data.images import as_pixels, encode_png, grid
from registry.events import follow
from registry.records import GenerationRecord, GenerationStatus
from service.access import GenerationDep, Sampler
from service.deps import IdempotencyKey, LastEventId, State, StateDep
from service.generations import accept_generation, pictures_of, stay_for
from service.streams import StreamDep, require_more

router = APIRouter(tags=["generations"])

Accept = Annotated[str, Header()]
PICTURE = {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}


@router.post(
    "/generate",
    response_model=GenerationResponse,
    responses={200: PICTURE, 202: {"model": GenerationResponse}},
)
async def generate(
    request: GenerateRequest,
    connection: Request,
    state: StateDep,
    caller: Sampler,
    accept: Accept = "application/json",
    prefer: Annotated[str, Header()] = "",
    key: IdempotencyKey = None,
) -> Response:
    """Sample images and wait for them; with `Prefer: respond-async`, answer 202 at once.

    With `Accept: image/png` the body is one PNG, a grid when there are several images. A client
    that closes the connection cancels its request, unless it can come back for it with the same
    Idempotency-Key.
    """
    record = await run_in_threadpool(accept_generation, state, request, key, caller)
    if "respond-async" in {name.lower() for name in parse_dict_header(prefer)}:  # RFC 7240
        return _accepted(record, {"Preference-Applied": "respond-async"})
    await stay_for(state, record, connection, may_leave=key is not None)
    return await run_in_threadpool(_answer_now, state, record, accept)


@router.get(
    "/generations/{generation_id}", response_model=GenerationResponse, responses={200: PICTURE}
)
def get_generation(
    record: GenerationDep, state: StateDep, _: Sampler, accept: Accept = "application/json"
) -> Response:
    """The images once the generation is done; until then its status."""
    if record.status == GenerationStatus.DONE:
        return _answer(state, record, accept)
    return JSONResponse(_response(record, []).model_dump())


async def _more(record: GenerationDep, state: StateDep, after: LastEventId = "0") -> None:
    await require_more(state, record, after)


@router.get(
    "/generations/{generation_id}/events",
    response_class=EventSourceResponse,
    dependencies=[Depends(_more)],
    responses={204: {"description": "There are no more events."}},
)
async def generation_events(
    record: GenerationDep,
    state: StateDep,
    stream: StreamDep,
    _: Sampler,
    after: LastEventId = "0",
) -> AsyncIterator[ServerSentEvent]:
    """Status changes and denoising steps, from the first to the last."""
    async for event in stream.of(follow(state.events, record, after)):
        yield ServerSentEvent(raw_data=event.data, event=event.name, id=event.id)


@router.post("/generations/{generation_id}/cancel")
def cancel_generation(record: GenerationDep, state: StateDep, _: Sampler) -> GenerationResponse:
    """Stop sampling between two steps."""
    cancelled = state.repository.generations.change(record.id, status=GenerationStatus.CANCELLED)
    return _response(cancelled, [])


def _accepted(record: GenerationRecord, headers: dict[str, str]) -> Response:
    headers = {"Location": f"/generations/{record.id}", **headers}
    return JSONResponse(_response(record, []).model_dump(), 202, headers=headers)


def _answer_now(state: State, record: GenerationRecord, accept: str) -> Response:
    with contextlib.suppress(RedisError):
        record = state.repository.generations.get(record.id)
    return _answer(state, record, accept) if record.finished else _accepted(record, {})


def _answer(state: State, record: GenerationRecord, accept: str) -> Response:
    """The images of a finished generation. Raises the Problem that ended it."""
    pictures = pictures_of(state, record)
    kinds = parse_accept_header(accept, MIMEAccept)
    if kinds.best_match(["application/json", "image/png"]) == "image/png":
        return Response(grid_png(pictures), media_type="image/png")
    images = [
        ImageResponse(b64_png=base64.b64encode(png).decode(), class_label=label, seed=seed)
        for png, label, seed in zip(pictures, record.class_labels, record.seeds, strict=True)
    ]
    return JSONResponse(_response(record, images).model_dump())


def _response(record: GenerationRecord, images: list[ImageResponse]) -> GenerationResponse:
    return GenerationResponse(
        id=record.id,
        status=record.status,
        model=record.model,
        revision=record.revision,
        sampling=record.sampling,
        elastic=record.served,
        images=images,
        seconds=Seconds(
            queued=_between(record.created_at, record.started_at),
            sampling=_between(record.started_at, record.finished_at),
        ),
        error=record.error,
    )


def _between(start: datetime | None, end: datetime | None) -> float | None:
    return (end - start).total_seconds() if start and end else None


def grid_png(pictures: Sequence[bytes]) -> bytes:
    """PNG of one picture as it is, or of several in a grid that is about square."""
    if len(pictures) == 1:
        return pictures[0]
    images = np.stack([as_pixels(Image.open(io.BytesIO(png))) for png in pictures])
    columns = math.ceil(math.sqrt(len(images)))
    return encode_png(grid(images[i : i + columns] for i in range(0, len(images), columns)))
