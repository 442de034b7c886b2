"""Records as the service leaves them."""

from learngenes.config import DType, Mode
from learngenes.sizing.budget import Budget, Cost, Plan
from registry.records import ModelRecord
from registry.store import ArtifactStore

A_COST = Cost(
    memory_bytes=300_000,
    process_memory_bytes=300_000_000,
    latency_seconds=0.1,
    latency_p95_seconds=0.12,
)
A_PLAN = Plan(3, 24, Mode.MATERIALISED, DType.FLOAT32, n=4, predicted=A_COST, quality=0.5)


def queued_model(
    family: str = "tiny", device_class: str = "a-device", plan: Plan = A_PLAN, **budget: object
) -> ModelRecord:
    """Model whose budget is two steps in 1 GB unless `budget` says otherwise."""
    return ModelRecord(
        id=ModelRecord.new_id(),
        name="a model",
        family=family,
        device_class=device_class,
        budget=Budget.model_validate({"max_mem_gb": 1.0, "num_inference_steps": 2, **budget}),
        plan=plan,
    )


def revision_name(store: ArtifactStore, model_id: str, revision: int) -> str:
    """Name of the only artifact of a revision of a model."""
    (directory,) = (store.root / "models" / model_id).glob(f"revision-{revision}-*")
    return f"models/{model_id}/{directory.name}"
