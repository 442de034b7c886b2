"""The build task: plan, assemble, publish unretrained, retrain Sigma, verify, publish.

A model that is measured over its budget is made again, smaller (`worker.build.budget`). One that
is to be refined is served retrained meanwhile, and whatever becomes of the refinement.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from pydantic_core import to_json
from redis import RedisError
from safetensors.torch import save as save_tensors

from fineserve.wire import DEFAULT_TASK
from learngenes.config import DType, Mode, Size
from learngenes.data.labelled import LabelledImages
from learngenes.device import release_memory
from learngenes.measuring.model import Measurement
from learngenes.model.factors import DenseLayers, Own
from learngenes.sizing.budget import Cost, Plan, Verified
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import Candidates, solve
from learngenes.training.refine import Refined, RefinementConfig, refine
from learngenes.training.retrain import TASK_RETRAINING, Retrained, RetrainingConfig, retrain
from learngenes.training.tuning import Pause, Progress
from registry import metrics
from registry.errors import ArtifactError, RecordNotFound, StorageFull, Superseded
from registry.records import ModelRecord, ModelStatus, now
from registry.store import record_name, served_name
from worker.artifacts import OWN_FILE, load_dataset, load_own
from worker.attempts import Reporter, attempt
from worker.build.budget import budgets_missed, step_down
from worker.build.profiles import candidates, correct_profile, ensure_profile
from worker.build.refinement import Pace, UntilEnough
from worker.build.restore import keep_if_ready
from worker.build.verify import Specimen, verify
from worker.runtime import Runtime

log = structlog.get_logger()

REVISIONS = 3
"""Number of revisions of a plan: as begun, retrained, refined."""


@dataclass(frozen=True)
class Tools:
    """Collaborators of a build; tests pass others in."""

    retrain: Callable[..., Retrained] = retrain
    refine: Callable[..., Refined] = refine
    verify: Callable[[Specimen, Own, Callable[[], object]], Measurement] = verify
    idle_seconds: float = 30.0
    """Seconds that verification waits for an idle device."""
    pace: Pace = field(default_factory=Pace)


TOOLS = Tools()


def build(runtime: Runtime, model_id: str, tools: Tools = TOOLS) -> None:
    """Make a queued model ready."""
    models = runtime.repository.models
    with runtime.watch.watched():
        attempt(runtime, models, model_id, lambda record: _Build(runtime, record, tools).run())
        release_memory(runtime.device)
    with contextlib.suppress(RecordNotFound):
        record = models.get(model_id)
        if record.status == ModelStatus.DELETED:
            runtime.store.delete(f"models/{model_id}")
        elif record.finished:
            directory = runtime.store.root / "models" / model_id
            for left in directory.glob("checkpoint-*"):
                left.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there are revisions in it
                directory.rmdir()


def _figures(tuned: Retrained | Refined) -> dict[str, float]:
    return {
        "steps": tuned.steps,
        "seconds": round(tuned.seconds, 1),
        "heldout_loss_before": tuned.initial_heldout_loss,
        "heldout_loss": tuned.heldout_loss,
    }


class _Build:
    profile: DeviceProfile
    """Profile of this device, as it is known by now."""

    def __init__(self, runtime: Runtime, record: ModelRecord, tools: Tools) -> None:
        self.runtime, self.tools = runtime, tools
        self.record = record
        self.family = runtime.family(record.family)
        self.workload, self.constraints = record.budget.workload, record.budget.constraints
        self.reporter = Reporter(runtime, runtime.repository.models, record)
        self._num_classes: int | None = None
        if record.task != DEFAULT_TASK:
            assert record.class_names is not None
            self._num_classes = len(record.class_names)

    @functools.cached_property
    def data(self) -> LabelledImages | None:
        """Data set of the model's task; None for the family's own.

        It is read when something is learned from it, and no sooner: a model that is served
        outlives its task.
        """
        if self.record.task == DEFAULT_TASK:
            return None
        return load_dataset(self.runtime.store, self.family, self.record.task, self.reporter.tell)

    def run(self) -> None:
        self.profile = ensure_profile(self.runtime, self.record.family)
        if self.record.revision is None:
            with metrics.timed(metrics.BUILD_PHASE.labels("assembling")):
                self._replan()
                self._publish_unretrained(self._begun())
        served: dict[str, object] = {}
        own = self._served_retrained()
        if own is None:
            own, measured = self._fit()
            served = {**self._store(self._retrained_revision, own), "measured": measured}
        if self.record.refine is not None:
            again = not served
            self._change(status=ModelStatus.REFINING, **served)
            if again and self.record.attempts >= self.runtime.settings.max_attempts:
                self._tell("refined", error="it was interrupted too often")
            else:
                with metrics.timed(metrics.BUILD_PHASE.labels("refining")):
                    served = self._refine(own)
        self._finish({"status": ModelStatus.READY, "ready_at": now(), **served})

    def _finish(self, changes: dict[str, object]) -> None:
        """Write the final record, first to the store, from where it returns if Redis loses it."""
        store, models = self.runtime.store, self.runtime.repository.models
        keep_if_ready(store, self.record.replace(**changes))
        try:
            self._change(**changes)
        except (Superseded, RecordNotFound):
            store.delete(record_name(self.record.id))
            with contextlib.suppress(RecordNotFound):  # another attempt may have been first
                keep_if_ready(store, models.get(self.record.id))
            raise

    def _fit(self) -> tuple[Own, Cost]:
        """Retrain what was not prepared, and measure, until a budget is kept, smaller each time."""
        own = self._begun()
        while True:
            if self.data is not None or not self.family.is_prepared(*self._variant):
                self._change(status=ModelStatus.RETRAINING)
                with metrics.timed(metrics.BUILD_PHASE.labels("retraining")):
                    own = self._retrain(own)
            measured, over = self._verify(own)
            if not over:
                return own, measured
            budget, tried = self.record.budget, len(self.record.over_budget)
            plan = step_down(
                self.record.plan, budget, measured, tried, self._candidates(self.profile)
            )
            log.info("stepping down", model=self.record.id, over=over, plan=plan)
            own = self._replace(plan, measured)

    def _replace(self, plan: Plan, measured: Cost) -> Own:
        """Begin again with a smaller plan; its first revision and the record change at once."""
        tried = Verified(plan=self.record.plan, measured=measured)
        over_budget = [*self.record.over_budget, tried]
        self.record = self.record.replace(plan=plan, over_budget=over_budget)
        smaller = self._begun()
        self._publish_unretrained(smaller, plan=plan, over_budget=over_budget)
        return smaller

    def _begun(self) -> Own:
        """What the present plan begins with."""
        if self._num_classes is None:
            return self.family.own_of(*self._variant)
        return self.family.for_task(self.family.scales_of(*self._variant), self._num_classes)

    def _publish_unretrained(self, own: Own, **changes: Any) -> None:
        """Publish what is begun with, unless its classes are new and nothing is learned yet."""
        if self._num_classes is None:
            changes |= self._store(self._unretrained_revision, own)
        self._change(**changes)

    @property
    def _size(self) -> Size:
        return Size(depth=self.record.plan.depth, rank=self.record.plan.rank)

    @property
    def _variant(self) -> tuple[Size, Mode, DType]:
        """What a Sigma is prepared for."""
        return self._size, self.record.plan.mode, self.record.plan.dtype

    @property
    def _unretrained_revision(self) -> int:
        """Number of the present plan's first revision; the retrained and refined ones follow."""
        return REVISIONS * len(self.record.over_budget)

    @property
    def _retrained_revision(self) -> int:
        return self._unretrained_revision + 1

    def _checkpoint_file(self, revision: int) -> Path:
        """Checkpoint of what becomes `revision`, valid for this size and these learngenes alone."""
        size, fingerprint = self._size, self.family.fingerprint
        name = f"checkpoint-{revision}-L{size.depth}r{size.rank}-{fingerprint}.safetensors"
        return self.runtime.store.root / "models" / self.record.id / name

    def _candidates(self, profile: DeviceProfile) -> Candidates:
        return candidates(self.family, profile, self.workload, self._num_classes)

    def _replan(self) -> None:
        """Plan again, since this device's profile may have changed since the request."""
        plan = solve(self._candidates(self.profile), self.constraints).plan
        if plan.constraints != self.record.plan.constraints:
            reason = "this device's profile has changed since the request"
            self._tell("replanned", before=self.record.plan, plan=plan, reason=reason)
        self._change(plan=plan)

    def _served_retrained(self) -> Own | None:
        """What was retrained, that an earlier attempt has published, to be refined."""
        if self.record.revision != self._retrained_revision:
            return None
        try:
            return load_own(self.runtime.store, self.family, served_name(self.record))
        except ArtifactError:  # corrupt, or made for another version of the family
            self.runtime.store.delete(served_name(self.record))
            return None

    def _refine(self, own: Own) -> dict[str, object]:
        """Changes that serve the refined revision; none where it is not better or failed."""
        assert self.record.refine is not None
        try:
            max_seconds = self.record.refine.max_seconds
            refined = self.tools.refine(
                self.family,
                own,
                RefinementConfig(max_seconds=max_seconds),
                UntilEnough(self.tools.pace, max_seconds, self._on_progress, self._others_wait),
                self._checkpoint_file(self._retrained_revision + 1),
                data=self.data,
                mode=self.record.plan.mode,
                dtype=self.record.plan.dtype,
            )
            figures = _figures(refined)
            log.info("refined", model=self.record.id, **figures)
            self._tell("refined", **figures)
            if refined.heldout_loss >= refined.initial_heldout_loss:
                return {}
            measured, over = self._verify(refined.layers)
            if over:
                return {}
            served = self._store(self._retrained_revision + 1, refined.layers)
        except (Pause, Superseded, RecordNotFound, StorageFull, RedisError):
            raise
        except Exception as error:  # the retrained model is there, and stays
            log.exception("not refined", model=self.record.id)
            self._tell("refined", error=f"{type(error).__name__}: {error}")
            return {}
        return {**served, "measured": measured}

    def _others_wait(self) -> bool:
        models = self.runtime.repository.models
        return any(
            other.id != self.record.id
            and other.device_class == self.runtime.device_class
            and not models.leased(other.id)
            for other in models.active()
        )

    def _retrain(self, own: Own) -> Own:
        """Train Sigma, or every W of imported layers, which have none."""
        settings = self.runtime.settings
        if isinstance(own, DenseLayers):
            refined = self.tools.refine(
                self.family,
                own,
                RefinementConfig(max_seconds=settings.retraining_max_seconds),
                self._on_progress,
                self._checkpoint_file(self._retrained_revision),
                mode=self.record.plan.mode,
                dtype=self.record.plan.dtype,
            )
            self._retrained(refined)
            return refined.layers
        config = RetrainingConfig(steps=settings.retraining_steps)
        if self.data is not None:
            config = TASK_RETRAINING.model_copy(update={"steps": settings.task_retraining_steps})
        retrained = self.tools.retrain(
            self.family,
            own,
            config.model_copy(update={"max_seconds": settings.retraining_max_seconds}),
            self._on_progress,
            data=self.data,
            checkpoint_file=self._checkpoint_file(self._retrained_revision),
            mode=self.record.plan.mode,
            dtype=self.record.plan.dtype,
        )
        self._retrained(retrained)
        return retrained.scales

    def _retrained(self, tuned: Retrained | Refined) -> None:
        metrics.RETRAINING_LOSS.labels("before").observe(tuned.initial_heldout_loss)
        metrics.RETRAINING_LOSS.labels("after").observe(tuned.heldout_loss)
        log.info("retrained", model=self.record.id, **_figures(tuned))

    def _verify(self, own: Own) -> tuple[Cost, list[str]]:
        """Measured cost, and the fields of the budget that it exceeds."""
        self._change(status=ModelStatus.VERIFYING)
        with metrics.timed(metrics.BUILD_PHASE.labels("verifying")):
            measured = self._measure(own)
        over = budgets_missed(self.constraints, measured)
        self._tell("verified", plan=self.record.plan, measured=measured, over_budget=over)
        return measured, over

    def _measure(self, own: Own) -> Cost:
        """Measure in a fresh process; the profile learns from it."""
        deadline = time.monotonic() + self.tools.idle_seconds
        while self._sampling() and time.monotonic() < deadline:
            self.reporter.tell()
            time.sleep(0.1)
        plan = self.record.plan
        measurement = self.tools.verify(
            Specimen(
                family=self.runtime.directories[self.record.family],
                depth=plan.depth,
                rank=plan.rank,
                mode=plan.mode,
                dtype=plan.dtype,
                workload=self.workload,
                max_seconds=self.runtime.settings.verify_seconds,
            ),
            own,
            self.reporter.tell,
        )

        def predicted(profile: DeviceProfile) -> Cost:
            return solve(self._candidates(profile), plan.constraints).plan.predicted

        measured = measurement.cost
        self.profile = correct_profile(self.runtime, self.family, self.profile, predicted, measured)
        for quantity in ("memory_bytes", "process_memory_bytes", "latency_p95_seconds"):
            ratio = getattr(measured, quantity) / getattr(plan.predicted, quantity)
            metrics.MEASURED_RATIO.labels(quantity).observe(ratio)
        return measured

    def _sampling(self) -> bool:
        """Whether this class of device has something to sample."""
        active = self.runtime.repository.generations.active()
        return any(record.device_class == self.runtime.device_class for record in active)

    def _change(self, **changes: Any) -> None:
        """Raises Superseded when this attempt is no longer the current one."""
        self.record = self.runtime.repository.models.change(
            self.record.id, attempt=self.record.attempts, **changes
        )

    def _tell(self, event: str, **data: object) -> None:
        self.runtime.repository.models.tell(self.record.id, event, to_json(data).decode())

    def _on_progress(self, progress: Progress | None) -> ModelRecord | None:
        """Tell the progress; returns the record if it was read."""
        if progress is None:
            return self.reporter.tell()

        def told() -> str:
            return json.dumps({"status": self.record.status, **progress.model_dump()})

        judged = progress.heldout_loss is not None
        return self.reporter.tell(told, every_seconds=0 if judged else None)

    def _store(self, revision: int, own: Own) -> dict[str, object]:
        """Store a revision; returns the changes of the record that serve it.

        The artifact is named for its plan and bytes: another attempt, killed before it could say
        so, may have stored this revision of another plan.
        """
        content = save_tensors(own.stacked())
        fingerprint = self.family.fingerprint
        made_of = to_json((self.record.plan, fingerprint)) + content
        digest = hashlib.sha256(made_of).hexdigest()[:12]
        served = {"revision": revision, "artifact": f"revision-{revision}-{digest}"}
        record = self.record.replace(**served)
        self.runtime.store.put(
            served_name(record),
            {OWN_FILE: content},
            {
                "record": record.model_dump(mode="json"),
                "revision": revision,
                "family_fingerprint": fingerprint,
            },
        )
        return served
