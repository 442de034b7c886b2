"""Generations: accepted from a request, waited for, and read as images."""

import asyncio
import contextlib
import secrets
from datetime import timedelta

import structlog
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from fineserve.wire import MAX_SEED, GenerateRequest
from learngenes.config import Mode, Sampling, Size
from registry.errors import IllegalTransition
from registry.events import follow
from registry.queue import SAMPLE_TASK
from registry.records import FamilyRecord, GenerationRecord, GenerationStatus, ModelRecord, now
from registry.store import generation_name, image_file
from service.access import Caller
from service.class_labels import resolve_classes
from service.connection import left
from service.deps import State
from service.planning import require_guide
from service.problems import Problem
from service.serving import require_family, require_servable, require_worker
from service.submission import accept, check_limits

log = structlog.get_logger()


def accept_generation(
    state: State, request: GenerateRequest, key: str | None, caller: Caller
) -> GenerationRecord:
    generations, most = state.repository.generations, state.settings.max_active_generations
    return accept(state, caller, request, key, _new_generation, generations, most, SAMPLE_TASK)


def _new_generation(state: State, request: GenerateRequest, caller: Caller) -> GenerationRecord:
    model = require_servable(state, request.model, caller)
    family = require_family(state, model)
    require_worker(state, model)
    labels = resolve_classes(request.class_labels, model.class_names or family.class_names)
    n = request.n or len(labels)
    sampling = request.over(model.plan.sampling or Sampling())
    check_limits(state.settings, n, sampling.num_inference_steps)
    if request.class_labels and n < len(labels):
        detail = f"n={n} is less than the {len(labels)} class_labels; raise n"
        raise Problem(422, "invalid-request", detail)
    _require_guide(sampling.guide, model, family)
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    return GenerationRecord(
        id=GenerationRecord.new_id(),
        model=model.id,
        device_class=model.device_class,
        class_labels=[labels[i % len(labels)] for i in range(n)],
        seeds=[(first + i) % (MAX_SEED + 1) for i in range(n)],
        deadline=request.deadline_seconds and now() + timedelta(seconds=request.deadline_seconds),
        owner=caller.owner,
        previews=request.previews,
        **dict(sampling),
    )


def _require_guide(guide: Size | None, model: ModelRecord, family: FamilyRecord) -> None:
    """Raise Problem unless this smaller size can guide the model."""
    require_guide(guide, family, len(model.class_names) if model.class_names else None)
    own = Size(depth=model.plan.depth, rank=model.plan.rank)
    if guide is None:
        return
    if model.plan.mode is Mode.DENSE:
        detail = f"model {model.id} is of imported layers, which no size guides: leave guide out"
        raise Problem(422, "unsuitable-guide", detail)
    if not guide.smaller_than(own):
        raise Problem(
            422,
            "unsuitable-guide",
            f"a guide is smaller than what it guides: {guide} is not, beside the model's {own}",
        )


async def stay_for(
    state: State, record: GenerationRecord, connection: Request, *, may_leave: bool
) -> None:
    """Wait until a generation is finished, or as long as the settings say.

    Raises Problem when the client has left: the work is then cancelled, unless the client may come
    back for it.
    """
    try:
        stayed = await _wait(state, record, connection)
    except RedisError as error:  # what was accepted is not to be asked for again
        log.warning("a generation cannot be waited for", record=record.id, error=str(error))
        return
    if not stayed and not may_leave:
        log.info("the client left", record=record.id)
        change = state.repository.generations.change
        with contextlib.suppress(IllegalTransition):  # it was done a moment ago
            await run_in_threadpool(change, record.id, status=GenerationStatus.CANCELLED)
        # nginx's status for an answer that nobody waits for
        raise Problem(499, "client-left", f"{record.id} was cancelled")


async def _wait(state: State, record: GenerationRecord, connection: Request) -> bool:
    """Whether the client has stayed."""

    async def finished() -> None:
        async for _ in follow(state.events, record):
            pass

    end, leaving = asyncio.create_task(finished()), asyncio.create_task(left(connection))
    try:
        seconds = state.settings.wait_seconds
        await asyncio.wait({end, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if end.done():
            end.result()  # raises when Redis went away
            return True
        return not leaving.done()
    finally:
        end.cancel()
        leaving.cancel()


def pictures_of(state: State, record: GenerationRecord) -> list[bytes]:
    """PNG files of a finished generation. Raises the Problem that ended it."""
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
    name = generation_name(record.id)
    return [state.store.read(name, image_file(i)) for i in range(len(record.seeds))]
