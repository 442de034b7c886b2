"""Ladders: a few sizes of a family among which a request can be served, best first."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from learngenes.config import DType, Mode, Sampling, Size, SizeSpace
from learngenes.sizing.quality import Floats, QualityTable

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
    of_depth = [Size(depth=depth, rank=top.rank) for depth in depths]
    worth = _worth(table, of_depth, samplings, mode, dtype).tolist()
    rungs = [
        Rung(size, sampling, quality)
        for sampling, qualities in zip(samplings, worth, strict=True)
        for size, quality in zip(of_depth, qualities, strict=True)
        if not (sampling.guided and sampling.guide and not sampling.guide.smaller_than(size))
        and quality > 0
    ]
    rungs.sort(key=lambda rung: (_work(rung), -rung.quality))
    kept: list[Rung] = []
    for rung in rungs:
        if not kept or rung.quality > kept[-1].quality:
            kept.append(rung)
    return tuple(reversed(kept))


def _worth(
    table: QualityTable,
    sizes: Sequence[Size],
    samplings: Sequence[Sampling],
    mode: Mode,
    dtype: DType,
) -> Floats:
    """Qualities (S, N) of sizes by samplings; by loss where not all have pictures."""
    depths, ranks = np.array([(size.depth, size.rank) for size in sizes]).T
    measured = table.distances(samplings, depths, ranks)
    if measured is not None:
        return table.picture_qualities(*measured)
    ratio = max(1.0, table.loss_ratio(mode, dtype))
    by_loss = np.zeros(len(sizes))
    if math.isfinite(ratio):
        by_loss = table.qualities(table.losses(depths, ranks) * ratio)
    return np.tile(by_loss, (len(samplings), 1))


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
