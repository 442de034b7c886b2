"""Refinement, after phase 2: train every W and bias of a model, which then shares only the stem."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.func import functional_call

from learngenes.config import DType, Mode
from learngenes.data.labelled import LabelledImages
from learngenes.device import training_precision
from learngenes.family.family import Family
from learngenes.model.dense import DenseDiT, materialised
from learngenes.model.factors import DenseLayers, Own
from learngenes.model.rounded import straight_through
from learngenes.training.muon import Muon
from learngenes.training.tuning import OnProgress, Tuned, Tuning, TuningConfig, teacher_of


class RefinementConfig(TuningConfig):
    steps: int = 10**9
    batch_size: int = 32
    learning_rate: float = 3e-3
    patience: int = 10


MATRIX_RATE = 3.0
"""Learning rate of Muon for W, relative to AdamW's for biases."""


@dataclass(frozen=True)
class Refined(Tuned):
    layers: DenseLayers


def refine(
    family: Family,
    own: Own,
    config: RefinementConfig,
    on_progress: OnProgress | None = None,
    checkpoint_file: Path | None = None,
    data: LabelledImages | None = None,
    mode: Mode = Mode.MATERIALISED,
    dtype: DType = DType.FLOAT32,
) -> Refined:
    """Train all W and biases of a model, of Sigma or of layers; its stem stays frozen.

    A lesser model than the family's full size learns half from what that predicts. In few bits
    every W is rounded as it is served; what is kept are the W before rounding. Stops when the
    held-out loss stops falling, and where `on_progress` raises Enough; the best layers are kept,
    those of `own` if nothing was better. A run that was killed goes on from `checkpoint_file`,
    where it is kept now and then and whenever `on_progress` raises Pause.
    """
    layers = own.layers() if isinstance(own, DenseLayers) else materialised(family.genes, own)
    model = DenseDiT(family.stem_of(own), layers)

    def predict(x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        with training_precision(x.device):
            inputs = (x, timesteps, class_labels)
            prediction: Tensor = functional_call(model, _as_served(model, dtype), inputs)
        return prediction.float()

    teacher = teacher_of(family, own, mode, dtype)
    data = data or family.limited_data
    model.to(family.stem.positions.device)
    optimizer = optimizer_of(model)
    tuning = Tuning(
        family, model.layers, predict, config, data, teacher, checkpoint_file, optimizer
    )
    tuned = tuning.run(on_progress)
    return Refined(**vars(tuned), layers=DenseLayers.of(model.weights(), own.classes))


def _as_served(model: DenseDiT, dtype: DType) -> dict[str, Tensor]:
    """Every W of the layers, rounded; nothing where they are floats."""
    if (bits := dtype.bits) is None:
        return {}
    return {
        f"layers.{name}": straight_through(weight, bits)
        for name, weight in model.layers.named_parameters()
        if name.endswith(".weight")
    }


def optimizer_of(model: DenseDiT) -> Muon:
    """Muon for W, AdamW for biases."""
    biases, weights = (
        [p for name, p in model.layers.named_parameters() if name.endswith(kind)]
        for kind in (".bias", ".weight")
    )
    groups: list[dict[str, object]] = [
        {"params": biases},
        {"params": weights, "rate": MATRIX_RATE, "orthogonal": True},
    ]
    return Muon(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
