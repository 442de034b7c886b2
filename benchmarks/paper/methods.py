"""How each method begins a model of a depth; see PROTOCOL.md."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks.paper import initialisations
from benchmarks.paper.ancestors import Ancestors, random_layer
from benchmarks.paper.rows import OURS
from benchmarks.paper.training import denoising_loss, train
from learngenes.config import Kind, Mode, Size
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.model.dense import DenseDiT, Weights, materialised
from learngenes.model.diffusion import Predict
from learngenes.model.dit import Stem
from learngenes.model.factors import Scales
from learngenes.training.retrain import RetrainingConfig, retrain

HEUR_LG_LAYERS = 3

M = TypeVar("M", bound=torch.nn.Module)

Begin = Callable[[Ancestors, int], DenseDiT]


def scratch(ancestors: Ancestors, depth: int) -> DenseDiT:
    layers = [random_layer(ancestors.setting) for _ in range(depth)]
    return DenseDiT(Stem(ancestors.setting.network), layers)


def weight_selection(ancestors: Ancestors, depth: int) -> DenseDiT:
    dense = ancestors.dense()
    return DenseDiT(dense.stem, dense.weights()[:depth])


def heur_lg(ancestors: Ancestors, depth: int) -> DenseDiT:
    dense = ancestors.dense()
    kept = min(depth, HEUR_LG_LAYERS)
    below = [random_layer(ancestors.setting) for _ in range(depth - kept)]
    return DenseDiT(dense.stem, below + dense.weights()[-kept:])


def tleg(ancestors: Ancestors, depth: int) -> DenseDiT:
    ancestor = ancestors.tleg()
    return DenseDiT(ancestor.stem, ancestor.layers(depth))


def pruning(ancestors: Ancestors, depth: int) -> DenseDiT:
    return pruned(ancestors.dense(), ancestors, depth)


@torch.no_grad()
def pruned(dense: DenseDiT, ancestors: Ancestors, depth: int) -> DenseDiT:
    """Greedy: the layer goes without which the loss on what chooses is least. Changes `dense`."""
    judged = ancestors.splits.choosing.subset(
        torch.arange(0, ancestors.setting.chosen_by_images, 4)
    )
    layers = list(dense.layers)
    while len(layers) > depth:

        def without(index: int) -> float:
            dense.layers = torch.nn.ModuleList(layers[:index] + layers[index + 1 :])
            return denoising_loss(dense, judged, ancestors.setting)

        layers.pop(min(range(len(layers)), key=without))
    dense.layers = torch.nn.ModuleList(layers)
    return dense


def svd(ancestors: Ancestors, depth: int) -> DenseDiT:
    dense = ancestors.dense()
    layers = dense.weights()
    chosen = [round(i * (len(layers) - 1) / max(1, depth - 1)) for i in range(depth)]
    return DenseDiT(dense.stem, [_cut(layers[i], ancestors.setting.svd_rank) for i in chosen])


def _cut(weights: Weights, rank: int) -> Weights:
    cut = {}
    for kind in Kind:
        weight, bias = weights[kind]
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        cut[kind] = (u[:, :rank] * s[:rank]) @ vt[:rank], bias
    return cut


METHODS: dict[str, Begin] = {
    "scratch": scratch,
    "weight selection": weight_selection,
    "heur-lg": heur_lg,
    "tleg": tleg,
    "pruning": pruning,
    "svd": svd,
}
FINE = {"fine as published": "fixed-depth", OURS: "any-size"}
"""Method to the form of its ancestor."""


@dataclass(frozen=True)
class Choice:
    """What is searched for a stage of a method."""

    first: float
    """Learning rate of stage A."""
    further: float
    """Learning rate of everything, afterwards."""
    distillation: float
    """Share of its teacher's prediction in what is learned; a Sigma alone learns half of it."""


def taught_by(ancestors: Ancestors, method: str) -> Predict | None:
    """The ancestor whole, of which a method's models learn; None for scratch."""
    if method == "scratch":
        return None
    if method == "tleg":
        return ancestors.tleg().requires_grad_(False)
    if method not in FINE:
        return ancestors.dense().requires_grad_(False)
    family = ancestors.fine(FINE[method])
    return family.assemble(family.scales, Mode.MATERIALISED)


def first_stage(
    ancestors: Ancestors, method: str, depth: int, seed: int, choice: Choice
) -> DenseDiT:
    """Initialise, and train for as many steps as Sigma is retrained."""
    torch.manual_seed(seed)
    if method in FINE:
        family = ancestors.fine(FINE[method])
        scales = _sigma(family, depth, seed, random=method == "fine as published")
        return written_out(family, retrained(ancestors, family, scales, seed, choice.first))
    model = METHODS[method](ancestors, depth)
    steps, teacher = ancestors.setting.sigma_steps, taught_by(ancestors, method)
    return train_all(
        model,
        ancestors,
        steps,
        seed,
        choice.first,
        teacher=teacher,
        distillation=choice.distillation,
    )


def later_stage(
    ancestors: Ancestors, method: str, model: DenseDiT, stage: str, seed: int, choice: Choice
) -> DenseDiT:
    """Train a copy of what stage A gave, everything, until the end of stage B or C."""
    return train_all(
        copy.deepcopy(model),
        ancestors,
        ancestors.setting.steps_after(stage),
        seed + 1000,
        choice.further,
        teacher=taught_by(ancestors, method),
        distillation=choice.distillation,
    )


def retrained(
    ancestors: Ancestors, family: Family, scales: Scales, seed: int, learning_rate: float
) -> Scales:
    """Scales retrained as by the service, but that nothing stops it early."""
    setting = ancestors.setting
    config = RetrainingConfig(
        steps=setting.sigma_steps,
        batch_size=setting.batch_size,
        learning_rate=learning_rate,
        max_seconds=float("inf"),
        patience=setting.sigma_steps,
        seed=seed,
    )
    return retrain(family, scales, config).scales


def written_out(family: Family, scales: Scales) -> DenseDiT:
    """Dense model of `scales` with a stem of its own, all to be trained."""
    stem = copy.deepcopy(family.stem).requires_grad_(True)
    return DenseDiT(stem, materialised(family.genes, scales))


def _sigma(family: Family, depth: int, seed: int, *, random: bool) -> Scales:
    size = Size(depth=depth, rank=family.full_size.rank)
    if random:
        generator = torch.Generator().manual_seed(seed)
        return initialisations.random(family.manifest.network, size, generator)
    return family.scales_of(size)


def train_all(
    model: M,
    ancestors: Ancestors,
    steps: int,
    seed: int,
    learning_rate: float,
    images: LabelledImages | None = None,
    teacher: Predict | None = None,
    distillation: float = 0.0,
) -> M:
    """All of `model` that can be trained, in place; on all training images by default."""
    train(
        model,
        images or ancestors.splits.training,
        ancestors.setting,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        warmup_steps=max(1, steps // 20),
        teacher=teacher,
        distillation=distillation,
    )
    return model
