"""The build task: plan, assemble, publish unretrained, retrain Sigma, verify, publish.

A model that is measured over its budget is made again, smaller (`worker.build.budget`). One that
is to be refined is served retrained meanwhile, and whatever becomes of the refinement.
"""

import contextlib
import dataclasses
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
from learngenes.config import DType, Mode, Sampling, SamplingRequest, Size
from learngenes.data.labelled import LabelledImages
from learngenes.device import release_memory
from learngenes.measuring.model import Measurement
from learngenes.model.factors import DenseLayers, Own
from learngenes.sizing.budget import Cost, Plan, Training, Verified
from learngenes.sizing.profile import DeviceProfile
from learngenes.sizing.solver import Candidates, solve
from learngenes.training.refine import Refined, RefinementConfig, refine
from learngenes.training.retrain import TASK_RETRAINING, Retrained, RetrainingConfig, retrain
from learngenes.training.tuning import Pause, Progress
from registry import metrics
from registry.errors import (
    ArtifactError,
    RecordNotFound,
    StorageFull,
    StoreAway,
    StoreRefuses,
    Superseded,
)
from registry.records import ModelRecord, ModelStatus, now
from registry.store import record_name, served_name
from worker.artifacts import OWN_FILE, load_dataset, load_own
from worker.attempts import Reporter, attempt
from worker.build.budget import budgets_missed, step_down
from worker.build.profiles import candidates, correct_profile, ensure_profile
from worker.build.refinement import Pace, UntilEnough
from worker.build.restore import keep_if_ready
from worker.build.stopwatch import Stopwatch, Timing
from worker.build.verify import Specimen, verify
from worker.runtime import Runtime

log = structlog.get_logger()

UNSERVED = "no worker of this device serves the family: an uncompiled batch was timed, alone"
REVISIONS = 3
"""Number of revisions of a plan: as begun, retrained, refined."""


@dataclass(frozen=True)
class Tools:
    """Collaborators of a build; tests pass others in."""

    retrain: Callable[..., Retrained] = retrain
    refine: Callable[..., Refined] = refine
    verify: Callable[[Specimen, Own, Callable[[], object]], Measurement] = verify
    stopwatch: Callable[..., Stopwatch] = Stopwatch
    pace: Pace = field(default_factory=Pace)


TOOLS = Tools()
KEEP_SECONDS = 60.0
"""Seconds after which a checkpoint is kept for other hosts again."""


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
        elif record.finished and record.status != ModelStatus.UNDERTRAINED:  # it goes on from there
            runtime.store.drop_checkpoints(f"models/{model_id}")


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
        self.constraints = record.budget.constraints
        self.reporter = Reporter(runtime, runtime.repository.models, record)
        self._checkpoint, self._kept_at = "", 0.0
        """Name of the checkpoint that is written now, and when it was kept last."""
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
        try:
            self._run()
        except Pause:
            self._keep_checkpoint(at_once=True)  # another host may go on from it
            raise
        if self.record.status == ModelStatus.UNDERTRAINED:
            self._keep_checkpoint(at_once=True)

    def _run(self) -> None:
        self.profile = ensure_profile(self.runtime, self.record.family)
        if self.record.revision is None:
            with metrics.timed(metrics.BUILD_PHASE.labels("assembling")):
                self._replan()
                self._publish_unretrained(self._begun())
        served: dict[str, object] = {}
        own = self._served_retrained()
        if own is None:
            fitted = self._fit()
            if fitted is None:
                return
            own, measured = fitted
            served = {**self._store(self._retrained_revision, own), **measured}
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

    def _fit(self) -> tuple[Own, dict[str, object]] | None:
        """Retrain what was not prepared, and measure, until a budget is kept, smaller each time.

        None where there was not time enough to train.
        """
        own = self._begun()
        served: dict[str, object]
        while True:
            if self.family.is_random:
                training = Training(0, 0, 0.0, "random")
            elif self.data is not None or not self.family.is_prepared(*self._variant):
                self._change(status=ModelStatus.RETRAINING)
                with metrics.timed(metrics.BUILD_PHASE.labels("retraining")):
                    own, training = self._retrain(own)
                if self._undertrained(training):
                    served = self._store(self._retrained_revision, own)
                    error = (
                        f"stopped after {training.steps} of {training.most_steps} steps: "
                        f"{training.stopped}; POST /models/{self.record.id}/continue goes on "
                        "from there, or ask for a smaller model"
                    )
                    status = ModelStatus.UNDERTRAINED
                    self._change(status=status, error=error, training=training, **served)
                    return None
            else:
                training = Training(0, 0, 0.0, "prepared")
            self._change(training=training)
            served = {}
            if self.record.revision is None:  # its latency is that of what is served
                served = self._store(self._retrained_revision, own)
            fields, over = self._verify(own, **served)
            if not over:
                return own, fields
            budget, tried = self.record.budget, len(self.record.over_budget)
            measured = fields["measured"]
            assert isinstance(measured, Cost)
            plan = step_down(
                self.record.plan, budget, measured, tried, self._candidates(self.profile), over
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
        served: dict[str, object] = {"revision": None, "artifact": None}
        if self._num_classes is None:
            served = self._store(self._unretrained_revision, own)
        self._change(**changes, **served)

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
        file = f"checkpoint-{revision}-L{size.depth}r{size.rank}-{fingerprint}.safetensors"
        self._checkpoint = f"models/{self.record.id}/{file}"
        self._kept_at = time.monotonic()
        return self.runtime.store.checkpoint(self._checkpoint)

    def _keep_checkpoint(self, *, at_once: bool = False) -> None:
        """Keep the checkpoint for other hosts, now and then."""
        due = at_once or time.monotonic() - self._kept_at > KEEP_SECONDS
        if self._checkpoint and due:
            self._kept_at = time.monotonic()
            self.runtime.store.keep_checkpoint(self._checkpoint)

    def _candidates(
        self, profile: DeviceProfile, asked: SamplingRequest | Sampling | None = None
    ) -> Candidates:
        """Candidates for what was asked for, by default for the budget."""
        budget = self.record.budget
        return candidates(self.family, profile, budget.n, asked or budget, self._num_classes)

    def _replan(self) -> None:
        """Plan again, since this device's profile may have changed since the request."""
        plan = solve(self._candidates(self.profile), self.constraints).plan
        if plan.constraints != self.record.plan.constraints:
            reason = "this device's profile has changed since the request"
            self._tell("replanned", before=self.record.plan, plan=plan, reason=reason)
        self._change(plan=plan)

    def _served_retrained(self) -> Own | None:
        """What was retrained, that an earlier attempt has published, to be refined."""
        if self.record.revision != self._retrained_revision or self.record.measured is None:
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
        except (Pause, Superseded, RecordNotFound, RedisError):
            raise
        except (StorageFull, StoreAway, StoreRefuses):  # later there may be room, or a store
            raise
        except Exception as error:  # the retrained model is there, and stays
            log.exception("not refined", model=self.record.id)
            self._tell("refined", error=f"{type(error).__name__}: {error}")
            return {}
        return {**served, **measured}

    def _others_wait(self) -> bool:
        models = self.runtime.repository.models
        return any(
            other.id != self.record.id
            and other.device_class == self.runtime.device_class
            and not models.leased(other.id)
            for other in models.active()
        )

    def _undertrained(self, training: Training) -> bool:
        """Whether time ended it before it had the steps that new classes need."""
        least = self.runtime.settings.task_least_steps
        return self.data is not None and training.stopped == "time" and training.steps < least

    def _retrain(self, own: Own) -> tuple[Own, Training]:
        """Train Sigma, or every W of imported layers, which have none."""
        settings = self.runtime.settings
        max_seconds = settings.retraining_max_seconds * (1 + self.record.continued)
        if isinstance(own, DenseLayers):
            refined = self.tools.refine(
                self.family,
                own,
                RefinementConfig(max_seconds=max_seconds),
                self._on_progress,
                self._checkpoint_file(self._retrained_revision),
                mode=self.record.plan.mode,
                dtype=self.record.plan.dtype,
            )
            return refined.layers, self._retrained(refined, refined.steps)
        config = RetrainingConfig(steps=settings.retraining_steps)
        if self.data is not None:
            steps, least = settings.task_retraining_steps, settings.task_least_steps
            config = TASK_RETRAINING.model_copy(
                update={"steps": steps, "least_steps": min(least, steps)}
            )
        retrained = self.tools.retrain(
            self.family,
            own,
            config.model_copy(update={"max_seconds": max_seconds}),
            self._on_progress,
            data=self.data,
            checkpoint_file=self._checkpoint_file(self._retrained_revision),
            mode=self.record.plan.mode,
            dtype=self.record.plan.dtype,
        )
        return retrained.scales, self._retrained(retrained, config.steps)

    def _retrained(self, tuned: Retrained | Refined, most_steps: int) -> Training:
        metrics.RETRAINING_LOSS.labels("before").observe(tuned.initial_heldout_loss)
        metrics.RETRAINING_LOSS.labels("after").observe(tuned.heldout_loss)
        log.info("retrained", model=self.record.id, stopped=tuned.stopped, **_figures(tuned))
        return Training(
            steps=tuned.steps,
            most_steps=most_steps,
            seconds=round(tuned.seconds, 1),
            stopped=tuned.stopped,
            heldout_loss_before=tuned.initial_heldout_loss,
            heldout_loss=tuned.heldout_loss,
        )

    def _verify(self, own: Own, **changes: Any) -> tuple[dict[str, object], list[str]]:
        """Measurement as fields of the record, and the fields of the budget that it exceeds."""
        self._change(status=ModelStatus.VERIFYING, **changes)
        with metrics.timed(metrics.BUILD_PHASE.labels("verifying")):
            measured, disturbed = self._measure(own)
        over = budgets_missed(self.constraints, measured, disturbed=bool(disturbed))
        self._tell(
            "verified",
            plan=self.record.plan,
            measured=measured,
            disturbed=disturbed,
            over_budget=over,
        )
        return {"measured": measured, "disturbed": disturbed}, over

    def _measure(self, own: Own) -> tuple[Cost, str]:
        """Measured cost, and what disturbed the latency in it; the profile learns from it.

        Memory is that of a fresh process, latency that of real generations.
        """
        plan = self.record.plan
        measured = self.tools.verify(
            Specimen(
                family=self.runtime.directories[self.record.family],
                depth=plan.depth,
                rank=plan.rank,
                mode=plan.mode,
                dtype=plan.dtype,
                workload=plan.workload,
            ),
            own,
            self.reporter.tell,
        ).cost
        seconds = self.runtime.settings.verify_seconds
        stopwatch = self.tools.stopwatch(self.runtime, seconds, self.reporter.tell)
        timing: Timing | None = stopwatch.time(self.record, plan.workload)
        disturbed, overhead_seconds = UNSERVED, None
        if timing is not None:
            disturbed = timing.disturbed
            overhead_seconds = None if disturbed else timing.overhead_seconds
            measured = dataclasses.replace(
                measured,
                latency_seconds=timing.latency_seconds,
                latency_p95_seconds=timing.latency_p95_seconds,
            )

        def predicted(profile: DeviceProfile) -> Cost:
            return self._candidates(profile, plan.workload.sampling).predicted(plan)

        self.profile = correct_profile(
            self.runtime, self.family, self.profile, predicted, measured, overhead_seconds
        )
        quantities = ["memory_bytes", "process_memory_bytes"]
        if not disturbed:
            quantities.append("latency_p95_seconds")
        for quantity in quantities:
            ratio = getattr(measured, quantity) / getattr(plan.predicted, quantity)
            metrics.MEASURED_RATIO.labels(quantity).observe(ratio)
        return measured, disturbed

    def _change(self, **changes: Any) -> None:
        """Raises Superseded when this attempt is no longer the current one."""
        self.record = self.runtime.repository.models.change(
            self.record.id, attempt=self.record.attempts, **changes
        )

    def _tell(self, event: str, **data: object) -> None:
        self.runtime.repository.models.tell(self.record.id, event, to_json(data).decode())

    def _on_progress(self, progress: Progress | None) -> ModelRecord | None:
        """Tell the progress; returns the record if it was read."""
        self._keep_checkpoint()
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
