"""Loss and FD of the form at several depths, of three seeds, beside what it is compared with.

Rivals: the dense ancestor of the paper's tables, its pruning with everything trained after it, and
the form that was shipped before, of which an ancestor is kept.
"""

import dataclasses
import json
import statistics
import time
from functools import cache

from benchmarks.paper.ancestors import WARMUP_STEPS, Ancestors, trained_family
from benchmarks.paper.depth import choices
from benchmarks.paper.judge import Judge
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import first_stage, later_stage, written_out
from benchmarks.paper.run import make_lab
from benchmarks.paper.setting import REFERENCE
from benchmarks.paper.training import denoising_loss
from benchmarks.parts import REPOSITORY, RESULTS, Figures, say
from learngenes.config import Size, SizeSpace
from learngenes.family.family import Family
from learngenes.model.dense import DenseDiT
from learngenes.training.config import PretrainingConfig, TrainingConfig

SETTING = dataclasses.replace(REFERENCE, samples=2000)
NETWORK = REFERENCE.network
SHIPPED_RANK = 2 * NETWORK.width
DEPTHS = (12, 10, 8, 6, 4, 3, 2)
JUDGED_BY_FD = (12, 8, 4)
SEEDS = (0, 1, 2)
PRUNED_DEPTH = 8
WORK = REPOSITORY / "var" / "form"


@cache
def lab() -> Lab:
    """The paper's, which keeps the ancestors and knows the learning rates; fewer samples."""
    paper = make_lab(REFERENCE, REPOSITORY / "var" / "paper" / REFERENCE.name)
    judge = Judge(SETTING, paper.ancestors.splits, WORK)
    return dataclasses.replace(paper, judge=judge)


def rivals() -> Figures:
    WORK.mkdir(parents=True, exist_ok=True)
    ancestors = lab().ancestors
    shipped = ancestors.factorised("any-size", SHIPPED_RANK)
    depths = {depth: _of_family(shipped, depth) for depth in DEPTHS}
    figures = {
        "dense": judged(ancestors.dense()),
        "pruned": judged(_pruned(ancestors)),
        "shipped_losses": {depth: loss_of(model) for depth, model in depths.items()},
        "shipped": judged(depths[SETTING.network.depth]),
        "floor_fd": lab().judge.floor(),
    }
    say("rivals", **figures)
    return figures


def _pruned(ancestors: Ancestors) -> DenseDiT:
    """Pruned to a depth, and everything trained for 500 steps, as in table 1."""
    choice = choices(lab(), "pruning")["B"]
    begun = first_stage(ancestors, "pruning", PRUNED_DEPTH, 0, choice)
    return later_stage(ancestors, "pruning", begun, "B", 0, choice)


def form() -> Figures:
    beside = json.loads((RESULTS / "form.json").read_text())["parts"]["rivals"]
    seeds = {seed: _of_seed(seed) for seed in SEEDS}

    def mean(what: str, depth: int) -> float:
        return statistics.mean(figures[what][depth] for figures in seeds.values())

    losses = [mean("losses", depth) for depth in DEPTHS]
    full, pruned = SETTING.network.depth, beside["pruned"]
    return {
        "full_loss_over_dense": round(losses[0] / beside["dense"]["loss"], 4),
        "l4_loss_over_shipped": round(mean("losses", 4) / beside["shipped_losses"]["4"], 4),
        "l8_fd_over_pruned": round(mean("fds", PRUNED_DEPTH) / pruned["fd"], 4),
        "depth_monotone": losses == sorted(losses),
        "full_fd": round(mean("fds", full), 1),
        "dense_fd": beside["dense"]["fd"],
        "losses": dict(zip(DEPTHS, (round(loss, 5) for loss in losses), strict=True)),
        "seeds": seeds,
    }


def _of_seed(seed: int) -> Figures:
    started = time.monotonic()
    family = trained(seed)
    seconds = round(time.monotonic() - started)
    models = {depth: _of_family(family, depth) for depth in DEPTHS}
    figures = {
        "losses": {depth: loss_of(model) for depth, model in models.items()},
        "fds": {depth: judged(models[depth])["fd"] for depth in JUDGED_BY_FD},
        "layer_order": family.manifest.layer_order,
        "seconds": seconds,
    }
    say(f"seed {seed}", **figures)
    return figures


def trained(seed: int) -> Family:
    """The family of a seed, trained unless it is there; a training that was killed goes on."""
    images = lab().ancestors.splits.training
    return trained_family(_config(seed), WORK / f"work-{seed}", WORK / f"seed-{seed}", images)


def _config(seed: int) -> PretrainingConfig:
    rate = SETTING.ancestor_learning_rate
    return PretrainingConfig(
        name="form",
        data=REFERENCE.data,
        network=NETWORK,
        diffusion=SETTING.diffusion,
        sizes=SizeSpace(depths=SETTING.trained_depths, ranks=(NETWORK.rank,)),
        training=TrainingConfig(
            steps=SETTING.ancestor_steps,
            batch_size=SETTING.batch_size,
            warmup_steps=WARMUP_STEPS,
            learning_rate=rate,
            sigma_learning_rate=3 * rate,
            healing_steps=0,
            seed=seed,
        ),
    )


def _of_family(family: Family, depth: int) -> DenseDiT:
    size = Size(depth=depth, rank=family.full_size.rank)
    return written_out(family, family.scales_of(size))


def loss_of(model: DenseDiT) -> float:
    return round(denoising_loss(model, lab().ancestors.splits.heldout, SETTING), 5)


def judged(model: DenseDiT) -> Figures:
    return dict(lab().judge(model.eval().requires_grad_(False)))
