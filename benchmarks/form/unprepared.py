"""Sigma alone for sizes that nobody prepared, by what a build does, beside prepared ones."""

import dataclasses

from benchmarks.form import quality
from benchmarks.paper.methods import written_out
from benchmarks.parts import Figures, say
from learngenes.config import Size
from learngenes.family.family import Family
from learngenes.model.factors import Scales
from learngenes.training.retrain import RetrainingConfig, retrain

DEPTH, RANK_SHARE = 7, 0.75


def measure() -> Figures:
    """A depth that is prepared, forgotten and retrained from its neighbour; a rank that is not."""
    family = quality.trained(quality.SEEDS[0])
    rank = family.full_size.rank
    depths = {depth: own for depth, own in family.depths.items() if depth != DEPTH}
    without = dataclasses.replace(family, depths=depths)
    prepared = _loss(family, family.scales_of(Size(depth=DEPTH, rank=rank)))
    size = Size(depth=DEPTH, rank=round(RANK_SHARE * rank))
    of_depth = _retrained(without, Size(depth=DEPTH, rank=rank))
    of_rank = _retrained(family, size)
    return {
        "unprepared_loss_over_prepared": round(of_depth["loss"] / prepared, 4),
        "unprepared_seconds": of_depth["seconds"],
        "prepared_loss": prepared,
        f"depth {DEPTH}, from its neighbour": of_depth,
        f"depth {DEPTH}, rank {size.rank} of {rank}": of_rank,
    }


def _retrained(family: Family, size: Size) -> Figures:
    begun = family.scales_of(size)
    before = _loss(family, begun)
    result = retrain(family, begun, RetrainingConfig())
    figures = {
        "loss_before": before,
        "loss": _loss(family, result.scales),
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
    }
    say(f"L{size.depth} r{size.rank}", **figures)
    return figures


def _loss(family: Family, scales: Scales) -> float:
    return quality.loss_of(written_out(family, scales))
