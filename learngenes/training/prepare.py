"""The last stage of a family: Sigma of each depth trained alone, by distillation (FINE, phase 2).

U, V and the stem are frozen by now, so that every depth, one after the other, becomes as good as
these factors let it be. What is prepared is served at once.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.files import replaced
from learngenes.model.factors import Scales
from learngenes.training.retrain import RetrainingConfig, retrain
from learngenes.training.tuning import Progress

PREPARATION = RetrainingConfig(
    steps=600, batch_size=32, learning_rate=1e-2, max_seconds=float("inf"), patience=12
)


def prepare(
    family: Family,
    data: LabelledImages,
    work: Path,
    config: RetrainingConfig = PREPARATION,
    on_progress: Callable[[int, int, float], object] = lambda *_: None,
) -> dict[int, Scales]:
    """Sigma of each depth, trained on `data`; that of the full size is as it was.

    What was prepared before is read from `work`, and a depth that was interrupted goes on from
    there. `on_progress` is called with (depth, steps done, loss).
    """
    prepared = dict(family.depths)
    for depth, begun in family.depths.items():
        if depth == family.full_size.depth:
            continue
        file = work / f"prepared-{depth}.safetensors"
        if not file.exists():
            scales = Scales.from_stacked(begun.stacked()).to(family.stem.positions.device)

            def told(progress: Progress, depth: int = depth) -> None:
                on_progress(depth, progress.step, progress.loss)

            unfinished = file.with_stem(f"preparing-{depth}")
            result = retrain(family, scales, config, told, data, unfinished)
            with replaced(file) as new:
                save_file(result.scales.stacked(), new)
        prepared[depth] = Scales.from_stacked(load_file(file)).requires_grad_(False)
    return prepared
