"""Generations: accepted from a request, waited for, and read as images."""

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from fineserve.wire import MAX_SEED, GenerateRequest
from learngenes.config import DType, Mode, Sampling, SamplingRequest, Size
from learngenes.sizing.ladder import ladder
from registry.errors import IllegalTransition
from registry.events import follow
from registry.queue import SAMPLE_TASK
from registry.records import (
    REFUSED,
    FamilyRecord,
    GenerationRecord,
    GenerationStatus,
    ModelRecord,
    Terms,
    now,
)
from registry.store import generation_name, image_file
from service.access import Caller
from service.class_labels import resolve_classes
from service.connection import left
from service.deps import State
from service.planning import (
    choose_family,
    require_calibrated,
    require_guide,
    require_quality,
)
from service.problems import Problem
from service.serving import require_family, require_servable, require_worker, sampling_class
from service.submission import accept, check_limits

log = structlog.get_logger()


def accept_generation(
    state: State, request: GenerateRequest, key: str | None, caller: Caller
) -> GenerationRecord:
    generations, most = state.repository.generations, state.settings.max_active_generations
    return accept(state, caller, request, key, _new_generation, generations, most, SAMPLE_TASK)


def _new_generation(state: State, request: GenerateRequest, caller: Caller) -> GenerationRecord:
    asks = _of_model if request.model is not None else _of_family
    subject = asks(state, request, caller)
    labels = resolve_classes(request.class_labels, subject.class_names)
    n, sampling = request.n or len(labels), subject.sampling
    check_limits(state.settings, n, sampling.num_inference_steps)
    if request.class_labels and n < len(labels):
        detail = f"n={n} is less than the {len(labels)} class_labels; raise n"
        raise Problem(422, "invalid-request", detail)
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    terms, ends = subject.terms, request.when_late == "end" or subject.terms is None
    return GenerationRecord(
        id=GenerationRecord.new_id(),
        model=subject.name,
        family=subject.family,
        elastic=terms,
        device_class=subject.device_class,
        class_labels=[labels[i % len(labels)] for i in range(n)],
        seeds=[(first + i) % (MAX_SEED + 1) for i in range(n)],
        deadline=_due(request) if ends else None,
        owner=caller.owner,
        previews=request.previews,
        **dict(sampling),
    )


def _due(request: GenerateRequest) -> datetime | None:
    seconds = request.deadline_seconds
    return None if seconds is None else now() + timedelta(seconds=seconds)


@dataclass(frozen=True)
class _Subject:
    """What is asked for images."""

    name: str
    family: str | None
    """Family of an elastic request; None where a model is asked."""
    device_class: str
    class_names: Sequence[str]
    sampling: Sampling
    terms: Terms | None


def _of_model(state: State, request: GenerateRequest, caller: Caller) -> _Subject:
    assert request.model is not None
    model = require_servable(state, request.model, caller)
    family = require_family(state, model)
    require_worker(state, model)
    sampling = request.over(model.plan.sampling or Sampling())
    _require_guide(sampling.guide, model, family)
    terms = None
    if model.elastic is not None:
        floor = max(model.elastic.min_quality, request.min_quality or 0.0)
        require_quality(floor, model.plan.quality, f"model {model.id}", "min_quality")
        terms = _terms(request, floor)
    elif unmet := _asks_for_sizes(request):
        detail = (
            f"model {model.id} has one size: leave {unmet} out, ask its family, or make a "
            "model with elastic"
        )
        raise Problem(422, "not-elastic", detail, field=unmet)
    names = model.class_names or family.class_names
    return _Subject(model.id, None, model.device_class, names, sampling, terms)


def _asks_for_sizes(request: GenerateRequest) -> str | None:
    """Field that a model of one size cannot do as it says; None where there is none."""
    if request.min_quality is not None:
        return "min_quality"
    smaller = "when_late" in request.model_fields_set and request.when_late == "smaller"
    return "when_late" if smaller else None


def _of_family(state: State, request: GenerateRequest, _: Caller) -> _Subject:
    family = choose_family(state, request.family)
    table = require_calibrated(family)
    require_guide(request.guide, family, None)
    rungs = ladder(
        table,
        family.sizes,
        table.samplings(request),
        top=family.network.full_size,
        mode=Mode.MATERIALISED,
        dtype=DType.FLOAT32,
    )
    if not rungs:
        detail = f"no size of {family.name} is larger than the guide {request.guide}: take another"
        raise Problem(422, "unsuitable-guide", detail, field="guide")
    best, floor = rungs[0], request.min_quality or 0.0
    require_quality(floor, best.quality, family.name, "min_quality")
    device_class = sampling_class(state, family)
    terms = _terms(request, floor)
    return _Subject(
        family.name, family.name, device_class, family.class_names, best.sampling, terms
    )


def _terms(request: GenerateRequest, floor: float) -> Terms:
    said = request.model_dump(include=set(SamplingRequest.model_fields))
    return Terms(
        asked=SamplingRequest.model_validate(said),
        due=_due(request),
        seconds=request.deadline_seconds,
        min_quality=floor,
        when_late=request.when_late,
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
    if record.problem == REFUSED:
        told = (record.error or "").partition(": ")[2]
        if record.retry_seconds is None:
            raise Problem(422, "infeasible-deadline", told, field="deadline_seconds")
        headers = {"Retry-After": str(record.retry_seconds)}
        raise Problem(429, "too-busy", told, headers=headers)
    if record.status == GenerationStatus.FAILED:
        raise Problem(500, "generation-failed", f"generation {record.id} failed: {record.error}")
    name = generation_name(record.id)
    return state.store.read_all(name, [image_file(i) for i in range(len(record.seeds))])
