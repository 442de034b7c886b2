"""The shipped family `fashion` itself: FD, class accuracy, sizes never trained, seconds of Sigma.

In one process with a thread for each core: nothing else should run.
"""

import contextlib
from unittest.mock import patch

import torch

from benchmarks.paper.lab import Lab
from benchmarks.paper.rows import Row, version
from benchmarks.paper.training import denoising_loss
from learngenes.config import Mode, Size
from learngenes.family.family import Family
from learngenes.model.factors import Scales
from learngenes.training.retrain import RetrainingConfig, retrain

STEPS = 300
UNSEEN = Size(depth=14, rank=100)
"""Deeper than any that it was trained at, and a rank between those."""


def measure(lab: Lab, family: Family) -> None:
    """Rows that do not depend on the protocol's scale."""
    of = {"family": version(family)}
    lab.rows.get({"shipped": "sigma", **of}, lambda: _seconds(family))
    lab.rows.get({"shipped": "unseen", **of}, lambda: _unseen(lab, family))
    lab.rows.get({"shipped": "quality", **of}, lambda: _quality(lab, family))


def _seconds(family: Family) -> Row:
    """Seconds of Sigma retraining at full size; before: in float32, and batches of 32."""

    def timed(**changes: int) -> float:
        return round(_retrained(family, family.full_size, **changes)[1], 1)

    with patch(
        "learngenes.training.retrain.training_precision", lambda _: contextlib.nullcontext()
    ):
        before = timed(batch_size=32)
    return {
        "steps": STEPS,
        "before_seconds": before,
        "seconds": timed(),
        "threads": torch.get_num_threads(),
    }


def _retrained(family: Family, size: Size, **changes: int) -> tuple[Scales, float]:
    config = RetrainingConfig(steps=STEPS, max_seconds=float("inf"), patience=STEPS)
    scales = family.scales_of(size)
    result = retrain(family, scales, config.model_copy(update=changes))
    return result.scales, result.seconds


def _unseen(lab: Lab, family: Family) -> Row:
    """Held-out loss of a size that was never trained, before and after Sigma retraining."""

    def loss(scales: Scales) -> float:
        model = family.assemble(scales, Mode.MATERIALISED)
        return round(denoising_loss(model, lab.judge.splits.heldout, lab.setting), 5)

    before = loss(family.scales_of(UNSEEN))
    scales, _ = _retrained(family, UNSEEN)
    after = loss(scales)
    return {"depth": UNSEEN.depth, "rank": UNSEEN.rank, "loss": before, "loss_retrained": after}


def _quality(lab: Lab, family: Family) -> Row:
    """FD and class accuracy at full size, nothing retrained: the service's guidance and none."""
    model = family.assemble(family.scales, Mode.MATERIALISED)
    return {f"guidance {scale:g}": lab.judge.quality(model, scale) for scale in (1.0, 2.0)}
