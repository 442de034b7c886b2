"""The build task: assemble, publish revision 0, retrain Sigma, measure, publish revision 1."""

import contextlib

import structlog
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from learngenes.config import Mode, Size
from learngenes.factors import Scales
from learngenes.family import Family
from learngenes.measure import Measurement, measure
from learngenes.retrain import Progress, RetrainingConfig, retrain
from learngenes.sigma import interpolated
from registry.errors import ArtifactError, RecordNotFound
from registry.records import ModelRecord, ModelStatus, now
from registry.store import ArtifactStore, revision_name
from worker.runtime import Reporter, Runtime

log = structlog.get_logger()

SCALES_FILE = "scales.safetensors"
GUIDANCE_SCALE = 2.0


class OverBudget(Exception):
    """The finished model needs more than its budget."""


def build(runtime: Runtime, model_id: str) -> None:
    """Make a queued model ready."""
    models = runtime.repository.models
    runtime.attempt(models, model_id, lambda record: _Build(runtime, record).run())
    with contextlib.suppress(RecordNotFound):
        if models.get(model_id).status == ModelStatus.DELETED:
            runtime.store.delete(f"models/{model_id}")


class _Build:
    def __init__(self, runtime: Runtime, record: ModelRecord) -> None:
        self.runtime = runtime
        self.record = record
        self.family = runtime.family(record.family)
        self.mode = Mode(record.plan.mode)
        self.reporter = Reporter(runtime, runtime.repository.models, record)

    def run(self) -> None:
        size = Size(depth=self.record.plan.depth, rank=self.record.plan.rank)
        scales = interpolated(self.family.scales, size)
        if self.record.revision is None:
            self._store(0, scales)
            self._change(revision=0)
        self._change(status=ModelStatus.RETRAINING)
        retrained = retrain(
            self.family,
            scales,
            RetrainingConfig(
                steps=self.runtime.settings.retraining_steps,
                max_seconds=self.runtime.settings.retraining_max_seconds,
            ),
            self._on_progress,
        )
        log.info(
            "retrained",
            model=self.record.id,
            steps=retrained.steps,
            seconds=round(retrained.seconds, 1),
            heldout_loss_before=retrained.initial_heldout_loss,
            heldout_loss=retrained.heldout_loss,
        )
        self._change(status=ModelStatus.VERIFYING)
        measured = self._measure(retrained.scales)
        self._store(1, retrained.scales)
        self._change(
            status=ModelStatus.READY,
            revision=1,
            measured={
                "memory_bytes": measured.memory_bytes,
                "latency_p95_seconds": measured.latency_p95_seconds,
            },
            ready_at=now(),
        )

    def _measure(self, scales: Scales) -> Measurement:
        budget = self.record.budget
        measured = measure(
            self.family.assemble(scales, self.mode),
            self.family.manifest.diffusion,
            n=self.record.plan.n,
            num_inference_steps=budget.num_inference_steps,
            guidance_scale=GUIDANCE_SCALE,
            on_step=lambda *_: self.reporter.tell(),
        )
        if measured.memory_bytes > budget.max_mem_gb * 1e9:
            raise OverBudget(
                f"measured {measured.memory_bytes} bytes, the budget is {budget.max_mem_gb} GB; "
                "ask for a slightly larger budget or a smaller n"
            )
        return measured

    def _change(self, **changes: object) -> None:
        """Raises Superseded when this attempt is no longer the current one."""
        self.runtime.repository.models.change(
            self.record.id, attempt=self.record.attempts, **changes
        )

    def _on_progress(self, progress: Progress) -> None:
        self.reporter.tell(progress.model_dump_json, now=progress.heldout_loss is not None)

    def _store(self, revision: int, scales: Scales) -> None:
        self.runtime.store.put(
            revision_name(self.record.id, revision),
            {SCALES_FILE: save_tensors(scales.stacked())},
            {
                "record": self.record.model_dump(mode="json"),
                "revision": revision,
                "family_fingerprint": self.family.fingerprint,
            },
        )


def load_scales(store: ArtifactStore, family: Family, model_id: str, revision: int) -> Scales:
    """A published revision's own parameters, on the family's device. Raises ArtifactError."""
    name = revision_name(model_id, revision)
    content = store.read(name, SCALES_FILE)
    if store.describe(name).get("family_fingerprint") != family.fingerprint:
        raise ArtifactError(
            f"{name} was made for another version of the family {family.manifest.name}; "
            "make another model"
        )
    scales = Scales.from_stacked(load_tensors(content))
    return scales.to(family.stem.positions.device)
