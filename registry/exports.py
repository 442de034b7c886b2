"""What a model can leave as, and where a worker leaves it."""

from enum import StrEnum

from registry.records import ModelRecord
from registry.store import served_name

EXPORT_FILE = "model.tar"


class ExportFormat(StrEnum):
    DIFFUSERS = "diffusers"
    """For plain diffusers: every W written out, in float32."""
    ONNX = "onnx"
    """The same network for ONNX runtimes."""
    NATIVE = "native"
    """U, V of the model's rank, its Sigma and the stem: what `learngenes` loads by itself."""
    ADAPTER = "adapter"
    """What is the model's own alone: `learngenes` adds the family, which has to be there."""


def export_name(model: ModelRecord, form: ExportFormat) -> str:
    """Artifact of what is served now of a model, in a format."""
    _, model_id, revision = served_name(model).split("/")
    return f"exports/{model_id}/{revision}-{form}"
