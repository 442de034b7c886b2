"""What a model can leave as, and where a worker leaves it."""

from enum import StrEnum

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


def export_name(model_id: str, revision: int, form: ExportFormat) -> str:
    return f"exports/{model_id}/revision-{revision}-{form}"
