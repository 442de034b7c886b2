"""Measure a family's quality table."""

import operator
from collections.abc import Callable, Sequence

from learngenes.config import DType, Mode, Size, executable
from learngenes.family.family import Family
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.factors import Scales
from learngenes.sizing.quality import QualityTable
from learngenes.training.retrain import Retrained, RetrainingConfig, retrain
from learngenes.training.tuning import split_heldout

OnSize = Callable[[int, int, Size, float, float], None]
"""Callback with (sizes done, in all, the size, its loss unretrained, its loss retrained)."""


def spread(values: Sequence[int], points: int) -> tuple[int, ...]:
    """At most `points` of `values`, evenly spaced, with both ends."""
    if len(values) <= points:
        return tuple(values)
    last = len(values) - 1
    return tuple(values[round(i * last / (points - 1))] for i in range(points))


def calibrate(
    family: Family, config: RetrainingConfig, points: int = 4, on_size: OnSize = lambda *_: None
) -> QualityTable:
    """Losses over a grid of at most `points` depths and ranks, each size retrained."""
    sizes = family.manifest.sizes
    depths, ranks = (spread(v, points) for v in (sizes.depths, sizes.ranks))
    results: list[list[Retrained]] = []
    for depth in depths:
        results.append([])
        for size in (Size(depth=depth, rank=rank) for rank in ranks):
            result = retrain(family, family.scales_of(size), config)
            results[-1].append(result)
            done, of = sum(map(len, results)), len(depths) * len(ranks)
            on_size(done, of, size, result.initial_heldout_loss, result.heldout_loss)
    corners = [results[-1][0].scales, results[-1][-1].scales]
    ratios = {mode: loss_ratios(family, corners, config, mode) for mode in Mode}
    few = {d: ratio for d, ratio in ratios[Mode.MATERIALISED].items() if d.bits is not None}
    return QualityTable(
        depths=depths,
        ranks=ranks,
        unretrained=tuple(tuple(r.initial_heldout_loss for r in row) for row in results),
        retrained=tuple(tuple(r.heldout_loss for r in row) for row in results),
        dtype_loss_ratios=ratios[Mode.FACTORED],
        materialised_loss_ratios=few,
        source=f"held-out denoising loss, {config.steps} steps of Sigma retraining",
    )


def loss_ratios(
    family: Family, models: Sequence[Scales], config: RetrainingConfig, mode: Mode
) -> dict[DType, float]:
    """Worst ratio among `models` of each dtype's held-out loss to float32's, in a mode.

    In few bits a model has the Sigma that was healed for them, or is retrained as it would be.
    """
    _, held = split_heldout(family.limited_data, config.heldout_images)
    device = family.stem.positions.device
    images, labels = held.normalised().to(device), held.labels.to(device)
    process = noise_process(family.manifest.diffusion)

    def loss(scales: Scales, dtype: DType) -> float:
        size = Size(depth=scales.depth, rank=scales.rank)
        if dtype.needs_healing and family.is_prepared(size, mode, dtype):
            scales = family.scales_of(size, mode, dtype)
        elif dtype.needs_healing:
            begun = Scales.from_stacked(scales.stacked())
            scales = retrain(family, begun, config, mode=mode, dtype=dtype).scales
        model = family.assemble(scales, mode, dtype)
        return heldout_loss(model, process, images, labels)

    dtypes = [dtype for dtype in DType if executable(mode, dtype)]
    losses = {dtype: [loss(scales, dtype) for scales in models] for dtype in dtypes}
    exact = losses[DType.FLOAT32]
    return {dtype: max(map(operator.truediv, losses[dtype], exact)) for dtype in dtypes}
