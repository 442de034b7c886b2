"""Measure a family's quality table."""

from collections.abc import Callable, Sequence

import torch

from learngenes.config import DType, Mode, Size
from learngenes.family.family import Family
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.factors import Scales
from learngenes.model.sigma import interpolated
from learngenes.sizing.quality import QualityTable
from learngenes.training.retrain import RetrainingConfig, retrain
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
    family: Family, config: RetrainingConfig, points: int = 4, on_size: OnSize | None = None
) -> QualityTable:
    """Losses over a grid of at most `points` depths and ranks, each size retrained."""
    sizes = family.manifest.sizes
    depths, ranks = (spread(v, points) for v in (sizes.depths, sizes.ranks))
    unretrained, retrained = [], []
    corners: list[Scales] = []
    for i, depth in enumerate(depths):
        results = []
        for j, rank in enumerate(ranks):
            size = Size(depth=depth, rank=rank)
            result = retrain(family, interpolated(family.scales, size), config)
            results.append(result)
            if depth == depths[-1] and rank in (ranks[0], ranks[-1]):
                corners.append(result.scales)
            if on_size is not None:
                done = i * len(ranks) + j + 1
                before, after = result.initial_heldout_loss, result.heldout_loss
                on_size(done, len(depths) * len(ranks), size, before, after)
        unretrained.append(tuple(r.initial_heldout_loss for r in results))
        retrained.append(tuple(r.heldout_loss for r in results))
    return QualityTable(
        depths=depths,
        ranks=ranks,
        unretrained=tuple(unretrained),
        retrained=tuple(retrained),
        dtype_loss_ratios=dtype_loss_ratios(family, corners, config.heldout_images),
        source=f"held-out denoising loss, {config.steps} steps of Sigma retraining",
    )


@torch.no_grad()
def dtype_loss_ratios(
    family: Family, models: Sequence[Scales], heldout_images: int
) -> dict[DType, float]:
    """Worst ratio among `models` of each dtype's held-out loss to float32's."""
    _, held = split_heldout(family.limited_data, heldout_images)
    device = family.stem.positions.device
    images, labels = held.normalised(torch.arange(len(held))).to(device), held.labels.to(device)
    process = noise_process(family.manifest.diffusion)
    ratios = dict.fromkeys(DType, 0.0)
    for scales in models:
        losses = {
            dtype: heldout_loss(
                family.assemble(scales, Mode.FACTORED, dtype), process, images, labels
            )
            for dtype in DType
        }
        for dtype in DType:
            ratios[dtype] = max(ratios[dtype], losses[dtype] / losses[DType.FLOAT32])
    return ratios
