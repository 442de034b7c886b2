"""Phase 1 of every method, each trained once and kept in the working directory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.paper.setting import DATA, Setting, Splits
from benchmarks.paper.training import train
from learngenes.config import Kind, SizeSpace
from learngenes.dense import DenseDiT, Weights
from learngenes.dit import Stem
from learngenes.factors import Layer
from learngenes.family import Family, load_family, save_family
from learngenes.pretrain import Pretraining, PretrainingConfig, TrainingConfig

M = TypeVar("M", bound=nn.Module)

TRAINING = "training"
AVERAGE_DECAY = 0.999
FORMS: dict[str, dict[str, object]] = {
    "fixed-depth": {"form": "fixed-depth"},
    "any-size": {"form": "any-size"},
    "any-size without distillation": {"form": "any-size", "distillation": 0.0},
}
"""What differs in phase 1; the last is for the picture of the forms alone."""
WARMUP_STEPS = 200


class LinearDiT(nn.Module):
    """TLEG's ancestor (arXiv 2312.05614): W and bias of layer l are B + l / (L - 1) A."""

    def __init__(self, stem: Stem, start: Weights, depth: int) -> None:
        super().__init__()
        self.stem, self.depth = stem, depth
        self.a = nn.ModuleDict({kind: _linear(*start[kind], times=0) for kind in Kind})
        self.b = nn.ModuleDict({kind: _linear(*start[kind], times=1) for kind in Kind})

    def layers(self, depth: int) -> list[Weights]:
        """Of any depth."""

        def at(position: float, kind: Kind) -> tuple[Tensor, Tensor]:
            a, b = (cast(nn.Linear, layer[kind]) for layer in (self.a, self.b))
            return b.weight + position * a.weight, b.bias + position * a.bias

        return [{kind: at(i / max(1, depth - 1), kind) for kind in Kind} for i in range(depth)]

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        prediction: Tensor = self.stem(
            x, timesteps, class_labels, [_layer(weights) for weights in self.layers(self.depth)]
        )
        return prediction


def _linear(weight: Tensor, bias: Tensor, *, times: float) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight * times)
        linear.bias.copy_(bias * times)
    return linear


def _layer(weights: Weights) -> Layer:
    def linear(kind: Kind) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.linear(x, *weights[kind])

    return {kind: linear(kind) for kind in Kind}


def random_layer(setting: Setting) -> Weights:
    """As DiT is initialised: Xavier, and zero for adaLN."""
    weights = {}
    for kind in Kind:
        m, n = kind.shape(setting.network.width)
        weight = torch.zeros(m, n)
        if kind is not Kind.ADALN:
            nn.init.xavier_uniform_(weight)
        weights[kind] = weight, torch.zeros(m)
    return weights


@dataclasses.dataclass(frozen=True)
class Ancestors:
    """Trained when they are first asked for."""

    setting: Setting
    splits: Splits
    work: Path

    def dense(self) -> DenseDiT:
        network = self.setting.network

        def begin() -> DenseDiT:
            layers = [random_layer(self.setting) for _ in range(network.depth)]
            return DenseDiT(Stem(network), layers)

        return self._kept("dense", begin)

    def tleg(self) -> LinearDiT:
        network = self.setting.network

        def begin() -> LinearDiT:
            return LinearDiT(Stem(network), random_layer(self.setting), network.depth)

        return self._kept("tleg", begin)

    def fine(self, form: str) -> Family:
        """`form`: one of FORMS."""
        directory = self.work / f"fine-{form}"
        if not (directory / "family.json").exists():
            self._pretrain(form, directory)
        return load_family(directory)

    def _kept(self, name: str, begin: Callable[[], M]) -> M:
        with torch.random.fork_rng():  # what a method draws is its own seed's
            torch.manual_seed(0)
            model = begin()
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            averaged = train(
                model,
                self.splits.training,
                self.setting,
                steps=self.setting.ancestor_steps,
                learning_rate=1e-3,
                seed=0,
                warmup_steps=WARMUP_STEPS,
                average_decay=AVERAGE_DECAY,
                checkpoint_file=self.work / f"{name}-training.safetensors",
            )
            save_file(averaged.state_dict(), path)
        model.load_state_dict(load_file(path))
        return model

    def _pretrain(self, form: str, directory: Path) -> None:
        setting = self.setting
        config = PretrainingConfig(
            name=form.replace(" ", "-"),
            data=DATA,
            network=setting.network,
            diffusion=setting.diffusion,
            sizes=SizeSpace(depths=setting.trained_depths, ranks=setting.trained_ranks),
            training=TrainingConfig.model_validate(
                {
                    **FORMS[form],
                    "steps": setting.ancestor_steps,
                    "batch_size": setting.batch_size,
                    "warmup_steps": WARMUP_STEPS,
                    "ema_decay": AVERAGE_DECAY,
                }
            ),
        )
        pretraining = Pretraining(config, directory / TRAINING)
        pretraining.images = self.splits.training
        network = pretraining.run().eval().requires_grad_(False)
        manifest = {
            **config.model_dump(include={"name", "network", "diffusion", "sizes"}),
            "class_names": DATA.class_names,
            "licence": DATA.licence,
            "trained_steps": config.training.steps,
            "form": config.training.form,
        }
        save_family(
            directory, manifest, network.genes, network.stem, network.scales, self.splits.limited
        )
