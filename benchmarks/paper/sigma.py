"""Seconds of 300 steps of Sigma retraining at a shipped family's full size, before and after.

Before: float32 products and batches of 32, as up to November 2026; the timesteps of a batch,
which are evenly spread since then, cost nothing.
"""

import contextlib
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.deployment import REPOSITORY
from benchmarks.paper.rows import Row, Rows
from learngenes.family import load_family
from learngenes.retrain import RetrainingConfig, retrain
from learngenes.sigma import interpolated

STEPS = 300
FAMILY = REPOSITORY / "families" / "fashion"


def measure(work: Path) -> Row:
    """In this process, with a thread for each core; nothing else should run."""
    return Rows(work / "rows").get({"sigma": "seconds"}, _measure)


def _measure() -> Row:
    with patch("learngenes.retrain.training_precision", lambda _: contextlib.nullcontext()):
        before = _seconds(batch_size=32)
    return {
        "steps": STEPS,
        "before_seconds": before,
        "seconds": _seconds(),
        "threads": torch.get_num_threads(),
    }


def _seconds(**changes: int) -> float:
    family = load_family(FAMILY)
    config = RetrainingConfig(steps=STEPS, max_seconds=float("inf"), patience=STEPS)
    scales = interpolated(family.scales, family.full_size)
    return round(retrain(family, scales, config.model_copy(update=changes)).seconds, 1)
