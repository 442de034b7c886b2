"""Ladders: a few sizes of a family among which a request can be served, best first."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from learngenes.config import DType, Mode, Sampling, Size, SizeSpace
from learngenes.sizing.quality import QualityTable

MOST_RUNGS = 5


class Rung(NamedTuple):
    size: Size
    sampling: Sampling
    quality: float
    """Quality, as plans state it."""


def ladder(
    table: QualityTable,
    sizes: SizeSpace,
    samplings: Sequence[Sampling],
    *,
    top: Size,
    mode: Mode,
    dtype: DType,
) -> tuple[Rung, ...]:
    """Up to MOST_RUNGS depths of the rank of `top`, none deeper, by each sampling; best first.

    What costs as much as another rung and is no better is left out.
    """
    depths = _spread([depth for depth in sizes.depths if depth <= top.depth])
    rungs = [
        Rung(size, sampling, quality)
        for size in (Size(depth=depth, rank=top.rank) for depth in depths)
        for sampling in samplings
        if not (sampling.guided and sampling.guide and not sampling.guide.smaller_than(size))
        and (quality := worth(table, size, sampling, samplings, mode, dtype)) > 0
    ]
    rungs.sort(key=lambda rung: (_work(rung), -rung.quality))
    kept: list[Rung] = []
    for rung in rungs:
        if not kept or rung.quality > kept[-1].quality:
            kept.append(rung)
    return tuple(reversed(kept))


def worth(
    table: QualityTable,
    size: Size,
    sampling: Sampling,
    samplings: Sequence[Sampling],
    mode: Mode,
    dtype: DType,
) -> float:
    """Quality of a size by a sampling, beside others; by loss where not all have pictures."""
    depth, rank = np.array([size.depth]), np.array([size.rank])
    measured = table.distances([*samplings, sampling], depth, rank)
    if measured is not None:
        return float(table.picture_qualities(*measured)[-1, 0])
    ratio = max(1.0, table.loss_ratio(mode, dtype))
    if not math.isfinite(ratio):
        return 0.0
    return float(table.qualities(table.losses(depth, rank) * ratio)[0])


def _spread(depths: Sequence[int]) -> list[int]:
    """At most MOST_RUNGS of them, the ratios of which are about alike, the first and the last."""
    if len(depths) <= MOST_RUNGS:
        return list(depths)
    wanted = np.geomspace(depths[0], depths[-1], MOST_RUNGS)
    return sorted({min(depths, key=lambda depth: abs(math.log(depth / w))) for w in wanted})


def _work(rung: Rung) -> int:
    """Rows of an image times the layers that they run through."""
    sampling, depth = rung.sampling, rung.size.depth
    guide = sampling.guide.depth if sampling.guide else depth
    return sampling.num_inference_steps * depth + len(sampling.guided) * guide
