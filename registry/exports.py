"""Where a worker leaves an export."""

from fineserve.wire import ExportFormat
from registry.records import ModelRecord
from registry.store import served_name

EXPORT_FILE = "model.tar"


def export_name(model: ModelRecord, form: ExportFormat) -> str:
    """Artifact of what is served now of a model, in a format."""
    _, model_id, revision = served_name(model).split("/")
    return f"exports/{model_id}/{revision}-{form}"
