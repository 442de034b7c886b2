"""Requirements of serving: a model, its family, and a worker on its class of device."""

from registry.queue import SAMPLE_QUEUE
from registry.records import FamilyRecord, ModelRecord, ModelStatus
from service.access import Caller, visible
from service.deps import State
from service.problems import Problem, unavailable


def require_servable(state: State, model_id: str, caller: Caller) -> ModelRecord:
    """Model of the caller, if images can be sampled from it now. Raises Problem."""
    record = visible(state.repository.models.get(model_id), caller)
    if record.servable:
        return record
    if record.status == ModelStatus.DELETED:
        raise Problem(410, "model-deleted", f"model {model_id} was deleted; make another one")
    if record.finished:
        raise Problem(
            409,
            f"model-{record.status}",
            f"model {model_id} {record.status}: {record.error or 'on request'}; make another one",
        )
    raise Problem(
        409,
        "model-not-ready",
        f"model {model_id} is {record.status}; follow /models/{model_id}/events and try again "
        "when its revision is 0 or more",
        headers={"Retry-After": "2"},
    )


def require_family(state: State, model: ModelRecord) -> FamilyRecord:
    """Family of a model. Raises Problem when no worker has it."""
    family = state.repository.family(model.family)
    if family is None:
        detail = f"no worker has the family {model.family} now; start one, or wait for it"
        raise unavailable(detail, "no-family")
    return family


def require_worker(state: State, model: ModelRecord) -> None:
    """Raise Problem when all workers that sample are of another class of device.

    Where there is no such worker at all one may be starting, and accepted requests wait for it.
    """
    classes = {
        w.device_class for w in state.repository.expected_workers() if w.queue == SAMPLE_QUEUE
    }
    if classes and model.device_class not in classes:
        raise unavailable(
            f"model {model.id} was made for {model.device_class}, and workers sample on "
            f"{', '.join(sorted(classes))} only: start one there, or make the model again here",
            "no-worker",
        )


def sampling_class(state: State, family: FamilyRecord) -> str:
    """Class of device on which most workers sample from a family. Raises Problem for none."""
    classes = [
        worker.device_class
        for worker in state.repository.expected_workers()
        if worker.queue == SAMPLE_QUEUE and family.name in worker.families
    ]
    if not classes:
        detail = f"no worker samples from the family {family.name} now; start one, or wait for it"
        raise unavailable(detail, "no-worker")
    return max(sorted(set(classes)), key=classes.count)
