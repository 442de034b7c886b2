"""Models at a caller's word: accepted from a budget, cancelled, deleted."""

from fineserve.wire import DEFAULT_TASK, Elastic, ModelRequest, Refinement
from learngenes.config import Mode
from learngenes.sizing.budget import Plan
from registry.datasets import Dataset
from registry.queue import BUILD_TASK
from registry.records import ModelRecord, ModelStatus
from service.access import Caller, visible
from service.deps import State
from service.planning import choose_site, require_quality, solve_budget
from service.problems import Problem
from service.submission import accept, enqueue


def accept_model(
    state: State, request: ModelRequest, key: str | None, caller: Caller
) -> ModelRecord:
    models, most = state.repository.models, state.settings.max_active_models
    return accept(state, caller, request, key, _new_model, models, most, BUILD_TASK)


def _new_model(state: State, request: ModelRequest, caller: Caller) -> ModelRecord:
    dataset = _dataset(state, request, caller)
    if dataset is not None:
        request = request.model_copy(update={"family": dataset.family})
    site = choose_site(state, request, live=True)
    if request.refine and not site.quality.depths:  # it has nothing but imported layers
        request = request.model_copy(update={"mode": Mode.DENSE})
    class_names = None if dataset is None else dataset.class_names
    solution = solve_budget(state, request, site, len(class_names) if class_names else None)
    if request.elastic is not None:
        _require_elastic(request.elastic, solution.plan)
    model_id = ModelRecord.new_id()
    return ModelRecord(
        id=model_id,
        owner=caller.owner,
        name=request.name or f"{dataset.name if dataset else site.family.name} {model_id}",
        family=site.family.name,
        device_class=site.profile.device_class,
        task=request.task,
        class_names=class_names,
        budget=request.budget,
        refine=request.refine and Refinement(max_seconds=request.refine.max_seconds),
        elastic=request.elastic,
        plan=solution.plan,
    )


def _require_elastic(elastic: Elastic, plan: Plan) -> None:
    """Raise Problem where no smaller size may serve a model."""
    if plan.mode is Mode.DENSE:
        detail = "a size of imported layers shares nothing with smaller ones: leave elastic out"
        raise Problem(422, "not-elastic", detail, field="elastic")
    of = "what the budget allows"
    require_quality(elastic.min_quality, plan.quality, of, "elastic.min_quality")


def _dataset(state: State, request: ModelRequest, caller: Caller) -> Dataset | None:
    """Data set of the task; None for the family's own images. Raises Problem."""
    if request.task == DEFAULT_TASK:
        return None
    dataset = visible(state.datasets.get(request.task), caller)
    if request.family not in (None, dataset.family):
        raise Problem(
            422,
            "other-family",
            f"task {dataset.id} is for the family {dataset.family}; leave family out, or "
            f"upload its images for {request.family}",
        )
    return dataset


def cancelled(current: ModelRecord) -> dict[str, object]:
    """Changes to a model that is cancelled: one that is being refined stays as it is."""
    if current.refine is not None and current.refinement_begun:
        return {"refine": current.refine.model_copy(update={"stopped": True})}
    return {"status": ModelStatus.CANCELLED}


def continue_training(state: State, record: ModelRecord) -> ModelRecord:
    """Give an undertrained model its time again; it goes on from its checkpoint. Raises Problem."""
    if record.status != ModelStatus.UNDERTRAINED:
        raise Problem(
            409,
            "not-undertrained",
            f"model {record.id} is {record.status}; only one that is undertrained goes on",
        )
    record = state.repository.models.change(
        record.id,
        status=ModelStatus.QUEUED,
        continued=record.continued + 1,
        attempts=0,
        error=None,
    )
    enqueue(state, BUILD_TASK, record)
    return record


def delete(state: State, record: ModelRecord) -> None:
    """Mark a model deleted, which ends a build that is under way, and then delete its artifacts."""
    if record.status != ModelStatus.DELETED:
        state.repository.models.change(record.id, status=ModelStatus.DELETED)
    delete_artifacts(state, record.id)


def delete_artifacts(state: State, model_id: str) -> None:
    for kind in ("models", "exports"):
        state.store.delete(f"{kind}/{model_id}")
