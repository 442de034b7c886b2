"""Table 4: other data, few images of them."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.paper.ancestors import Ancestors
from benchmarks.paper.judge import Judge
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import pruning, scratch, train_all, written_out
from benchmarks.paper.rows import Row
from benchmarks.paper.setting import Setting, Splits
from benchmarks.paper.training import denoising_loss
from benchmarks.parts import REPOSITORY
from learngenes.config import Size
from learngenes.data import labelled
from learngenes.data.labelled import LabelledImages
from learngenes.model.dense import DenseDiT, materialised
from learngenes.model.dit import Stem
from learngenes.model.factors import Learngenes, Scales
from learngenes.training.network import predict

TASKS = ("animal-mnist", "mnist")
CHOOSING = 100
"""Images of a class, of the first task, that learning rates are chosen by; never trained on."""
SEARCHED_SHOTS = 50

Case = tuple[str, int, str, int]


def cases(setting: Setting) -> list[Case]:
    return [*itertools.product(TASKS, setting.shots, METHODS, setting.seeds)]


class SigmaDiT(nn.Module):
    """A model of which Sigma, biases and the class embeddings are trained."""

    def __init__(self, stem: Stem, genes: Learngenes, scales: Scales) -> None:
        super().__init__()
        self.stem, self.genes, self.scales = stem, genes, scales
        self.requires_grad_(False)
        for own in (self.scales, self.stem.classes):
            own.requires_grad_(True)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return predict(self.stem, self.genes, self.scales, (x, timesteps, class_labels))


def _begin(ancestors: Ancestors, method: str) -> DenseDiT | SigmaDiT:
    """Class embeddings are the task's: new in every method."""
    depth = ancestors.setting.searched_depth
    family = ancestors.fine("any-size")
    scales = family.scales_of(Size(depth=depth, rank=family.full_size.rank))
    model: DenseDiT | SigmaDiT
    if method == "fine, sigma":
        model = SigmaDiT(family.stem, family.genes, scales)
    elif method == "fine, all":
        model = written_out(family, scales)
    else:
        model = {"scratch": scratch, "dense, all": pruning}[method](ancestors, depth)
    nn.init.normal_(model.stem.classes.weight, std=0.02)
    return model


METHODS = ("scratch", "dense, all", "fine, all", "fine, sigma")


@functools.cache
def _load(setting: Setting, task: str) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Images to train on, to choose by, to judge by."""
    classes = [str(i) for i in range(setting.network.num_classes)]
    path, side = REPOSITORY / "var" / "data" / task, setting.network.sample_size
    train, test = (labelled.load(path, split, classes, side) for split in ("train", "test"))
    if setting.most_images is not None:
        train, test = train.balanced(setting.most_images), test.balanced(setting.most_images)
    kept = min(CHOOSING, len(train) // len(classes) // 2)
    chosen = torch.cat(
        [torch.nonzero(train.labels == label).flatten()[-kept:] for label in train.labels.unique()]
    )
    rest = torch.ones(len(train), dtype=torch.bool).index_fill(0, chosen, value=False)
    training = train if task != TASKS[0] else train.subset(torch.nonzero(rest).flatten())
    return training, train.subset(chosen), test


@functools.cache
def judge_of(lab: Lab, task: str) -> Judge:
    training, _, test = _load(lab.setting, task)
    splits = Splits(training, training, training, test, test)
    return dataclasses.replace(lab.judge, splits=splits, name=task)


def _trained(
    lab: Lab, task: str, shots: int, method: str, seed: int, learning_rate: float
) -> DenseDiT:
    training, _, _ = _load(lab.setting, task)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    some = training.subset(order).balanced(shots * lab.setting.network.num_classes)
    torch.manual_seed(seed)
    model = _begin(lab.ancestors, method)
    train_all(model, lab.ancestors, lab.setting.task_steps, seed, learning_rate, some)
    if isinstance(model, SigmaDiT):
        return DenseDiT(model.stem, materialised(model.genes, model.scales))
    return model


def learning_rate(lab: Lab, method: str) -> float:
    rates: Sequence[float] = lab.setting.learning_rates
    if method == "fine, sigma":
        rates = lab.setting.sigma_learning_rates
    _, choosing, _ = _load(lab.setting, TASKS[0])

    def loss(rate: float) -> float:
        model = _trained(lab, TASKS[0], SEARCHED_SHOTS, method, 0, rate)
        return denoising_loss(model, choosing, lab.setting)

    return min(
        rates,
        key=lambda rate: lab.outcome({"task search": method, "rate": rate}, lambda: loss(rate)),
    )


def measure(lab: Lab, task: str, shots: int, method: str, seed: int) -> list[Row]:
    key = {"table": "task", "task": task, "shots": shots, "method": method, "seed": seed}
    if not lab.rows.has(key):
        rate = learning_rate(lab, method)
        model = _trained(lab, task, shots, method, seed, rate)
        steps = lab.setting.task_steps
        lab.judged(key, model, judge_of(lab, task), steps=steps, learning_rate=rate)
    return [lab.rows.get(key, dict)]
