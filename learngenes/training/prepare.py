"""The last stages of a family: Sigma of each depth trained alone, by distillation (FINE, phase 2).

U, V and the stem are frozen by now, so that every depth, one after the other, becomes as good as
these factors let it be; then the same once more for matrices in few bits, where Sigma mends what
rounding broke. What is prepared is served at once.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from learngenes.config import DType, Mode
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family, Precision
from learngenes.files import replaced
from learngenes.model.factors import Scales
from learngenes.training.retrain import RetrainingConfig, retrain
from learngenes.training.tuning import Progress

PREPARATION = RetrainingConfig(
    steps=600, batch_size=32, learning_rate=1e-2, max_seconds=float("inf"), patience=12
)
FULL_SIZE_SHARE = 0.2
"""Share of the learning rate with which Sigma of the full size is trained alone."""
HEALING = PREPARATION.model_copy(update={"steps": 300})
HEALED: tuple[Precision, ...] = (
    (Mode.FACTORED, DType.INT4),
    (Mode.FACTORED, DType.INT3),
    (Mode.MATERIALISED, DType.INT4),
)
OnProgress = Callable[[str, int, float], object]
"""Callback with (what is trained, steps done, loss)."""


def prepare(
    family: Family,
    data: LabelledImages,
    work: Path,
    config: RetrainingConfig = PREPARATION,
    on_progress: OnProgress = lambda *_: None,
) -> dict[int, Scales]:
    """Sigma of each depth, trained on `data`; gently that of the full size, which has learned most.

    What was prepared before is read from `work`, and a depth that was interrupted goes on from
    there.
    """
    gentle = config.model_copy(update={"learning_rate": FULL_SIZE_SHARE * config.learning_rate})
    return {
        depth: _trained(
            begun,
            str(depth),
            family,
            data,
            work,
            gentle if depth == family.full_size.depth else config,
            on_progress,
        )
        for depth, begun in family.depths.items()
    }


def heal(
    family: Family,
    data: LabelledImages,
    work: Path,
    config: RetrainingConfig = HEALING,
    on_progress: OnProgress = lambda *_: None,
) -> dict[Precision, dict[int, Scales]]:
    """Sigma of each depth, the full one too, trained on `data` with the matrices in few bits."""
    return {
        (mode, dtype): {
            depth: _trained(
                begun,
                f"{mode}-{dtype}-{depth}",
                family,
                data,
                work,
                config,
                on_progress,
                mode,
                dtype,
            )
            for depth, begun in family.depths.items()
        }
        for mode, dtype in HEALED
    }


def _trained(
    begun: Scales,
    name: str,
    family: Family,
    data: LabelledImages,
    work: Path,
    config: RetrainingConfig,
    on_progress: OnProgress,
    mode: Mode = Mode.FACTORED,
    dtype: DType = DType.FLOAT32,
) -> Scales:
    file = work / f"prepared-{name}.safetensors"
    if not file.exists():
        scales = Scales.from_stacked(begun.stacked()).to(family.stem.positions.device)

        def told(progress: Progress) -> None:
            on_progress(name, progress.step, progress.loss)

        unfinished = file.with_stem(f"preparing-{name}")
        result = retrain(family, scales, config, told, data, unfinished, mode, dtype)
        with replaced(file) as new:
            save_file(result.scales.stacked(), new)
    return Scales.from_stacked(load_file(file)).requires_grad_(False)
