"""What the engine is asked for: a record in its words, and its answer in those of a record."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from fineserve.wire import Served
from learngenes.config import DType, Mode, Sampling, Size
from learngenes.device import native_bfloat16
from learngenes.family.family import Family
from learngenes.model.factors import Own
from learngenes.sizing.budget import Workload
from learngenes.sizing.ladder import Rung, ladder
from learngenes.stepping.weights import kept
from registry.errors import Refused
from registry.records import GenerationRecord, ModelRecord, Terms, now
from registry.store import served_name
from worker.artifacts import load_own
from worker.runtime import Runtime
from worker.sampling.elastic import Choice
from worker.sampling.jobs import Elastic, Job, SampleRequest, choice_of

LATENCY_ROOM, LEAST_ROOM_SECONDS = 3.0, 0.5
"""Multiple of its measured 95th percentile, and seconds more, in which an elastic model's request
is to be there, if neither it nor the model names a time."""


def request_of(runtime: Runtime, record: GenerationRecord, model: ModelRecord) -> SampleRequest:
    family, artifact = runtime.family(model.family), served_name(model)
    plan = model.plan
    return SampleRequest(
        family=family,
        model=model.id,
        artifact=artifact,
        depth=plan.depth,
        rank=plan.rank,
        mode=plan.mode,
        dtype=plan.dtype,
        load=lambda: kept(load_own(runtime.store, family, artifact), family, plan.mode, plan.dtype),
        class_labels=record.class_labels,
        seeds=record.seeds,
        sampling=record.sampling,
        load_guide=_loader(family, record.guide, plan.mode, plan.dtype),
        owner=record.owner,
        target_seconds=target_seconds(record, model),
    )


def elastic_of(
    runtime: Runtime, record: GenerationRecord, terms: Terms, model: ModelRecord | None
) -> Elastic:
    """What a request may be served by: sizes of its family, or its model and those below it.

    Raises Refused where none is as good as its caller wants.
    """
    choices: dict[Choice, SampleRequest] = {}
    if model is not None:
        own = request_of(runtime, record, model)
        choices[choice_of(own, model.plan.quality)] = own
        family, mode, dtype = own.family, own.mode, own.dtype
        top = Size(depth=own.depth, rank=own.rank)
    else:
        assert record.family is not None
        family, mode = runtime.family(record.family), Mode.MATERIALISED
        dtype = DType.BFLOAT16 if native_bfloat16(runtime.device) else DType.FLOAT32
        top = family.full_size
    for rung in _rungs(family, terms, [record.sampling] if model else None, top, mode, dtype):
        if model is not None and rung.size.depth >= top.depth:
            continue
        request = _of_size(family, rung, record, mode, dtype)
        choices.setdefault(choice_of(request, rung.quality), request)
    if not choices:
        raise Refused(f"no size is of quality {terms.min_quality:g}: ask for less", None)
    left = math.inf if terms.due is None else (terms.due - now()).total_seconds()
    if terms.seconds is not None:
        left = min(left, terms.seconds)
    elif model is not None:
        usual = LATENCY_ROOM * _usual_seconds(record, model) + LEAST_ROOM_SECONDS
        left = target_seconds(record, model) or usual
    return Elastic(
        choices,
        deadline=time.monotonic() + left,
        yields=terms.seconds is not None,
        shrinks=terms.when_late == "smaller",
    )


def served_by(job: Job, record: GenerationRecord) -> dict[str, Any]:
    """Changes of an elastic request's record that say by what it was served."""
    promise, elastic, terms = job.promise, job.elastic, record.elastic
    if promise is None or elastic is None or terms is None:
        return {}
    request, shrunk = job.request, job.shrunk
    chosen = elastic.choices[promise.choice]
    took = (now() - record.created_at).total_seconds()
    served = Served(
        size=Size(depth=chosen.depth, rank=chosen.rank),
        quality=(shrunk or promise.choice).quality,
        best_quality=max(choice.quality for choice in elastic.choices),
        promised_seconds=terms.seconds,
        foreseen_seconds=took - (time.monotonic() - job.decided_at) + promise.seconds,
        took_seconds=took,
        estimated=promise.estimated,
        finished_by=Size(depth=request.depth, rank=request.rank) if shrunk else None,
    )
    return {"served": served, **dict(request.sampling)}


def _rungs(
    family: Family,
    terms: Terms,
    samplings: Sequence[Sampling] | None,
    top: Size,
    mode: Mode,
    dtype: DType,
) -> list[Rung]:
    table = family.quality
    if table is None:
        return []
    known = samplings or table.samplings(terms.asked)
    rungs = ladder(table, family.manifest.sizes, known, top=top, mode=mode, dtype=dtype)
    return [rung for rung in rungs if rung.quality >= terms.min_quality]


def _of_size(
    family: Family, rung: Rung, record: GenerationRecord, mode: Mode, dtype: DType
) -> SampleRequest:
    size, sampling = rung.size, rung.sampling
    load = _loader(family, size, mode, dtype)
    assert load is not None
    return SampleRequest(
        family=family,
        model=family.manifest.name,
        artifact=f"{family.fingerprint} {size} {mode} {dtype}",
        depth=size.depth,
        rank=size.rank,
        mode=mode,
        dtype=dtype,
        load=load,
        class_labels=record.class_labels,
        seeds=record.seeds,
        sampling=sampling,
        load_guide=_loader(family, sampling.guide, mode, dtype),
        owner=record.owner,
    )


def _loader(
    family: Family, size: Size | None, mode: Mode, dtype: DType
) -> Callable[[], Own] | None:
    """Loader of the parameters of a size as the family holds it; None for none."""
    if size is None:
        return None
    return lambda: kept(family.own_of(size, mode, dtype), family, mode, dtype)


def _usual_seconds(record: GenerationRecord, model: ModelRecord) -> float:
    """Seconds that a model's request takes where nobody else is there, at worst."""
    cost = model.measured or model.plan.predicted
    return cost.latency_p95_seconds * _times(record, model)


def _times(record: GenerationRecord, model: ModelRecord) -> float:
    """How many times the work of its plan a request of a model is."""
    asked, planned = Workload(len(record.seeds), record.sampling), model.plan.workload
    longer = asked.rows_of_an_image / planned.rows_of_an_image
    return longer * max(1, asked.n / planned.n)


def target_seconds(record: GenerationRecord, model: ModelRecord) -> float | None:
    """Model's latency budget, for as many steps and images as are asked for; or what is left
    until the request's deadline."""
    targets = []
    if record.deadline is not None:
        targets.append((record.deadline - now()).total_seconds())
    if model.budget.max_latency_ms is not None:
        targets.append(model.budget.max_latency_ms / 1000 * _times(record, model))
    return min(targets, default=None)
