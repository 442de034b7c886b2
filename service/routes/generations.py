"""/generate and /generations: from a model to images."""

import asyncio
import base64
import contextlib
import difflib
import io
import json
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated

import structlog
from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from PIL import Image
from redis import RedisError

from fineserve.wire import (
    MAX_SEED,
    GenerateRequest,
    GenerationResponse,
    ImageResponse,
    Seconds,
)
from registry.errors import IllegalTransition
from registry.events import follow, stream_key
from registry.queue import SAMPLE_TASK
from registry.records import GenerationRecord, GenerationStatus, now
from registry.store import generation_name, image_file
from service.access import Caller, GenerationDep, Sampler
from service.deps import IdempotencyKey, LastEventId, State, StateDep
from service.problems import Problem, no_family
from service.routes.models import require_servable, require_worker
from service.streams import events
from service.submission import check_limits, require_room, submit

log = structlog.get_logger()

router = APIRouter(tags=["generations"])

CLIENT_CLOSED_REQUEST = 499
"""nginx's word for an answer that nobody waits for."""

Accept = Annotated[str, Header()]
Prefer = Annotated[str, Header()]


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
    prefer: Prefer = "",
    key: IdempotencyKey = None,
) -> Response:
    """Sample images and wait for them; with `Prefer: respond-async`, answer 202 at once.

    With `Accept: image/png` the body is one PNG, a grid when there are several images. A client
    that closes the connection cancels its request, unless it can come back for it with the same
    Idempotency-Key.
    """
    record = await run_in_threadpool(accept_generation, state, request, key, caller)
    if "respond-async" in prefer:
        return _accepted(record, {"Preference-Applied": "respond-async"})
    if not await stay_for(state, record, connection, may_leave=key is not None):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return await run_in_threadpool(_answer_now, state, record, accept)


@router.get(
    "/generations/{generation_id}",
    response_model=GenerationResponse,
    responses={200: PICTURE},
)
def get_generation(
    record: GenerationDep, state: StateDep, _: Sampler, accept: Accept = "application/json"
) -> Response:
    """The images once it is done; until then its status."""
    if record.status == GenerationStatus.DONE:
        return _answer(state, record, accept)
    return JSONResponse(_response(record, []).model_dump())


@router.get("/generations/{generation_id}/events", response_class=EventSourceResponse)
async def generation_events(
    record: GenerationDep, state: StateDep, _: Sampler, after: LastEventId = "0"
) -> AsyncIterator[ServerSentEvent]:
    """Status changes and denoising steps, from the first to the last."""
    async for event in events(state, record, after):
        yield event


@router.post("/generations/{generation_id}/cancel")
def cancel_generation(record: GenerationDep, state: StateDep, _: Sampler) -> GenerationResponse:
    """Stop sampling between two steps."""
    cancelled = state.repository.generations.change(record.id, status=GenerationStatus.CANCELLED)
    return _response(cancelled, [])


def accept_generation(
    state: State, request: GenerateRequest, key: str | None, caller: Caller
) -> GenerationRecord:
    generations, body = state.repository.generations, request.model_dump_json()
    room = caller.room(state.settings.max_active_generations)
    stored = generations.replay(caller.owner, key, body)
    if stored is None:
        generations.require_room(caller.owner, room)
        record = _new_generation(state, request, caller)
        stored = generations.create(record, key, body, room)
    submit(state, SAMPLE_TASK, stored)
    return stored


def _new_generation(state: State, request: GenerateRequest, caller: Caller) -> GenerationRecord:
    require_room(state)
    model = require_servable(state, request.model, caller)
    family = state.repository.family(model.family)
    if family is None:
        raise no_family(model.family)
    require_worker(state, model)
    labels = resolve_classes(request.class_labels, model.class_names or family.class_names)
    n = request.n or len(labels)
    check_limits(state.settings, n, request.num_inference_steps)
    if request.class_labels and n < len(labels):
        raise Problem(
            422, "invalid-request", f"n={n} is less than the {len(labels)} class_labels; raise n"
        )
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    return GenerationRecord(
        id=GenerationRecord.new_id(),
        model=model.id,
        device_class=model.device_class,
        class_labels=[labels[i % len(labels)] for i in range(n)],
        seeds=[(first + i) % (MAX_SEED + 1) for i in range(n)],
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.scheduler,
        previews=request.previews,
        deadline=request.deadline_seconds and now() + timedelta(seconds=request.deadline_seconds),
        owner=caller.owner,
    )


def resolve_classes(wanted: Sequence[int | str] | None, names: Sequence[str]) -> list[int]:
    """Class numbers of names or numbers. Raises Problem 422 with close names."""
    if wanted is None:
        return list(range(len(names)))
    resolved = []
    for label in wanted:
        number = label if isinstance(label, int) else _number_of(label, names)
        if number is None or not 0 <= number < len(names):
            close = _close(str(label), names)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise Problem(
                422,
                "unknown-class",
                f"no class {label!r}; {hint}It is a number from 0 to {len(names) - 1} "
                f"or one of {', '.join(names)}",
                classes=list(names),
            )
        resolved.append(number)
    return resolved


def _number_of(label: str, names: Sequence[str]) -> int | None:
    """Of a class by its name, or else by that in other letter case, or else by its number."""
    if label in names:
        return names.index(label)
    folded = [name.casefold() for name in names]
    if label.casefold() in folded:
        return folded.index(label.casefold())
    return int(label) if label.isdecimal() and len(label) <= len(str(len(names))) else None


def _close(label: str, names: Sequence[str]) -> list[str]:
    """Names that are spelt alike, or that are among the words of `label`."""
    folded = {name.casefold(): name for name in names}
    words = f" {label.casefold()} "
    among = [name for name in folded if f" {name} " in words]
    alike = difflib.get_close_matches(label.casefold(), folded, n=3, cutoff=0.5)
    return [folded[name] for name in [*among, *(a for a in alike if a not in among)][:3]]


async def stay_for(
    state: State, record: GenerationRecord, connection: Request, *, may_leave: bool
) -> bool:
    """Wait for its end, or as long as the settings say.

    False when the client has left, and the work with it, unless it may come back for it.
    """
    try:
        stayed = await _wait(state, record, connection)
    except RedisError as error:  # what was accepted is not to be asked for again
        log.warning("cannot wait for it", record=record.id, error=str(error))
        return True
    if not stayed and not may_leave:
        await run_in_threadpool(_abandon, state, record)
    return stayed or may_leave


async def _wait(state: State, record: GenerationRecord, connection: Request) -> bool:
    """Until the end, or for as long as the settings say; False when the client has left."""

    async def finished() -> None:
        async for event in follow(state.events, stream_key(record.NAME, record.id)):
            if event.name == "status" and json.loads(event.data)["status"] in record.FINISHED:
                return

    async def left() -> None:
        while (await connection.receive())["type"] != "http.disconnect":
            pass

    end, leaving = asyncio.create_task(finished()), asyncio.create_task(left())
    try:
        await asyncio.wait(
            {end, leaving},
            timeout=state.settings.wait_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if end.done():
            end.result()  # raises when Redis went away
            return True
        return not leaving.done()
    finally:
        end.cancel()
        leaving.cancel()


def _abandon(state: State, record: GenerationRecord) -> None:
    log.info("the client left", record=record.id)
    with contextlib.suppress(IllegalTransition):  # it was done a moment ago
        state.repository.generations.change(record.id, status=GenerationStatus.CANCELLED)


def _accepted(record: GenerationRecord, headers: dict[str, str]) -> Response:
    location = {"Location": f"/generations/{record.id}"}
    return JSONResponse(_response(record, []).model_dump(), 202, headers={**location, **headers})


def _answer_now(state: State, record: GenerationRecord, accept: str) -> Response:
    with contextlib.suppress(RedisError):
        record = state.repository.generations.get(record.id)
    return _answer(state, record, accept) if record.finished else _accepted(record, {})


def _answer(state: State, record: GenerationRecord, accept: str) -> Response:
    """The images of a finished generation. Raises the Problem that ended it."""
    pictures = pictures_of(state, record)
    if "image/png" in accept:
        return Response(grid_png(pictures), media_type="image/png")
    images = [
        ImageResponse(b64_png=base64.b64encode(png).decode(), class_label=label, seed=seed)
        for png, label, seed in zip(pictures, record.class_labels, record.seeds, strict=True)
    ]
    return JSONResponse(_response(record, images).model_dump())


def pictures_of(state: State, record: GenerationRecord) -> list[bytes]:
    """PNGs of a finished generation. Raises the Problem that ended it."""
    if record.status == GenerationStatus.CANCELLED:
        raise Problem(409, "generation-cancelled", f"generation {record.id} was cancelled")
    if record.problem == "model-gone":
        raise Problem(410, "model-gone", f"{record.error}; nothing can be sampled from it")
    if record.problem == "deadline-missed":
        raise Problem(
            409,
            "deadline-missed",
            f"generation {record.id} was not done within its deadline_seconds; allow more, ask for "
            "less, or come back when less is asked for",
        )
    if record.status == GenerationStatus.FAILED:
        raise Problem(500, "generation-failed", f"generation {record.id} failed: {record.error}")
    return [
        state.store.read(generation_name(record.id), image_file(i))
        for i in range(len(record.seeds))
    ]


def _response(record: GenerationRecord, images: list[ImageResponse]) -> GenerationResponse:
    return GenerationResponse(
        id=record.id,
        status=record.status,
        model=record.model,
        revision=record.revision,
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
    """One picture as it is, several as a grid that is about square."""
    if len(pictures) == 1:
        return pictures[0]
    images = [Image.open(io.BytesIO(png)) for png in pictures]
    width, height = images[0].size
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    grid = Image.new(images[0].mode, (columns * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()
