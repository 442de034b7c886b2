"""Records as the service would leave them."""

from registry.records import Budget, ModelRecord, PlanRecord, Predicted


def queued_model(
    family: str = "tiny", max_mem_gb: float = 1.0, mode: str = "materialised"
) -> ModelRecord:
    return ModelRecord(
        id=ModelRecord.new_id(),
        name="a model",
        family=family,
        budget=Budget(max_mem_gb=max_mem_gb, n=4, num_inference_steps=2),
        plan=PlanRecord(
            depth=3,
            rank=24,
            mode=mode,
            dtype="float32",
            n=4,
            predicted=Predicted(memory_bytes=1, latency_seconds=None),
        ),
    )
