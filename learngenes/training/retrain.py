"""Phase 2: train one model's Sigma and biases on limited data; U, V and the stem are frozen."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from learngenes.config import DType, Mode
from learngenes.data.labelled import LabelledImages
from learngenes.device import training_precision
from learngenes.family.family import Family
from learngenes.model.factors import Scales
from learngenes.model.rounded import rounded_genes
from learngenes.training import network
from learngenes.training.tuning import OnProgress, Tuned, Tuning, TuningConfig, teacher_of


class RetrainingConfig(TuningConfig):
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 3e-3
    max_seconds: float = 60.0
    patience: int = 3


TASK_RETRAINING = RetrainingConfig(steps=1000, batch_size=16, learning_rate=1e-2, patience=10)
"""Retraining on other images than the family's own, where there is more to learn."""


@dataclass(frozen=True)
class Retrained(Tuned):
    scales: Scales


def retrain(
    family: Family,
    scales: Scales,
    config: RetrainingConfig,
    on_progress: OnProgress | None = None,
    data: LabelledImages | None = None,
    checkpoint_file: Path | None = None,
    mode: Mode = Mode.FACTORED,
    dtype: DType = DType.FLOAT32,
) -> Retrained:
    """Train `scales` (changed in place; of `Family.for_task` for other classes) on `data`.

    A lesser model than the family's full size learns half from what that predicts. In few bits
    the matrices are rounded as they are served, so that Sigma mends what rounding broke.
    `on_progress` is called after every step and may raise to cancel. Training stops after
    `steps`, after `max_seconds`, or when the held-out loss stops falling; the learning rate falls
    along a cosine to the nearer of the first two. The scales with the best held-out loss are kept,
    be they the given ones. A run that was killed goes on from `checkpoint_file`.
    """

    genes, weight_bits = family.genes, None
    if dtype.bits is not None and mode is Mode.FACTORED:
        genes = rounded_genes(genes, scales.rank, dtype.bits)
    elif dtype.bits is not None:
        weight_bits = dtype.bits

    def predict(x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        noisy, stem = (x, timesteps, class_labels), family.stem_of(scales)
        with training_precision(x.device):
            return network.predict(stem, genes, scales, noisy, weight_bits=weight_bits).float()

    data = data or family.limited_data
    teacher = teacher_of(family, scales, mode, dtype)
    tuning = Tuning(family, scales, predict, config, data, teacher, checkpoint_file)
    return Retrained(**vars(tuning.run(on_progress)), scales=scales)
