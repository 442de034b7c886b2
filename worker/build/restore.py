"""Restoring the records of finished models from the store when Redis has lost them."""

import structlog
from pydantic import ValidationError

from registry.errors import ArtifactError, RecordNotFound, RecordUnreadable
from registry.lifecycle import Records
from registry.records import ModelRecord, ModelStatus
from registry.store import ArtifactStore, record_name

log = structlog.get_logger()

ABANDONED_SECONDS = 7 * 24 * 3600.0
"""Age after which the remains of an unfinished build are deleted, if no record knows it."""


def restore(store: ArtifactStore, models: Records[ModelRecord]) -> int:
    """Restore records; returns their number. Remains of deleted models are removed."""
    restored = 0
    for model_id in store.ids("models"):
        try:
            known: ModelRecord | None = models.get(model_id)
        except RecordNotFound:
            known = None
        except RecordUnreadable as error:  # somebody is to delete it
            log.error("a model is left as it is", reason=str(error))
            continue
        if known is not None:
            if known.status == ModelStatus.DELETED:
                store.delete(f"models/{model_id}")
            elif known.finished:  # a worker that was killed may have left the store another
                keep_if_ready(store, known)
            continue
        record = kept_record(store, model_id)
        if record is not None:
            models.create(record)
            restored += 1
        elif _abandoned(store, model_id):
            log.warning("deleting what an unfinished build has left", model=model_id)
            store.delete(f"models/{model_id}")
    if restored:
        log.warning("records restored from the store", models=restored)
    return restored


def keep_if_ready(store: ArtifactStore, record: ModelRecord) -> None:
    """Make the store's record of a model this one, or none where it is not ready."""
    if record.status != ModelStatus.READY:
        store.delete(record_name(record.id))
    elif kept_record(store, record.id) != record:
        description = {"record": record.model_dump(mode="json")}
        store.replace_description(record_name(record.id), description)


def kept_record(store: ArtifactStore, model_id: str) -> ModelRecord | None:
    """The store's record of a model that was ready; None also where it cannot be read."""
    try:
        return ModelRecord.model_validate(store.describe(record_name(model_id))["record"])
    except (ArtifactError, KeyError):
        return None  # it was not finished
    except ValidationError as error:
        log.error("a record that this version cannot read", model=model_id, error=str(error))
        return None


def _abandoned(store: ArtifactStore, model_id: str) -> bool:
    if store.has(record_name(model_id)):
        return False  # it was finished, and its record can be read or not
    return store.idle_seconds(f"models/{model_id}") > ABANDONED_SECONDS
