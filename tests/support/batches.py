"""Parts of a batch as the sampling engine makes them, without an engine."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learngenes.config import DType, Kind, Mode, Scheduler, Size
from learngenes.family.family import Family
from learngenes.model.factors import Scales
from learngenes.model.sampling import initial_noise
from learngenes.model.sigma import interpolated
from learngenes.stepping.batch import Batch, Part, Stack, Tables
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.schedules import schedule
from learngenes.stepping.weights import FactoredWeights, ModelWeights, SharedWeights


def other_scales(family: Family, size: Size, seed: int) -> Scales:
    """A model of that size which has little in common with other seeds' ones."""
    scales = interpolated(family.scales, size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in scales.layers():
            for kind in Kind:
                noise = torch.randn(layer.sigma[kind].shape, generator=generator)
                layer.sigma[kind].add_(noise, alpha=0.3)
    return scales


def weights(shared: SharedWeights, scales: Scales, mode: Mode) -> ModelWeights:
    model = FactoredWeights(shared, scales)
    if mode is Mode.MATERIALISED:
        model.materialise()
    return model


def random_models(
    shared: SharedWeights, count: int, generator: random.Random, modes: Sequence[Mode] = tuple(Mode)
) -> list[ModelWeights]:
    """Of the family's own depths and any rank; int8's scales are those of one."""
    family = shared.family
    depths, most = family.manifest.sizes.depths, family.manifest.network.rank
    modes = modes if shared.dtype is not DType.INT8 else [Mode.FACTORED]
    models = []
    for seed in range(count):
        mode = generator.choice(modes)
        rank = most if shared.dtype is DType.INT8 else generator.randint(1, most)
        size = Size(depth=generator.choice(depths), rank=rank)
        models.append(weights(shared, other_scales(family, size, seed), mode))
    return models


@dataclass
class Desk:
    """Makes parts, and keeps the tables that they look things up in."""

    shared: SharedWeights
    coefficients: list[Tensor] = field(default_factory=list)
    modulations: list[Tensor] = field(default_factory=list)

    @property
    def tables(self) -> Tables:
        return Tables(torch.cat(self.coefficients), torch.cat(self.modulations))

    def part(
        self,
        model: ModelWeights,
        class_labels: Sequence[int],
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 4,
        guidance_scale: float = 2.0,
        scheduler: Scheduler = Scheduler.DDIM,
    ) -> Part:
        diffusion = self.shared.family.manifest.diffusion
        steps = schedule(diffusion, scheduler, num_inference_steps)
        at = {
            label: self._add(self.modulations, model.modulations(steps.timesteps, label))
            for label in dict.fromkeys([*class_labels, self.shared.network.num_classes])
        }
        noise = initial_noise(self.shared.network, seeds)
        return Part(
            model,
            steps,
            self._add(self.coefficients, steps.coefficients),
            [at[label] for label in class_labels],
            at[self.shared.network.num_classes] if guidance_scale > 1 else None,
            guidance_scale,
            noise * steps.initial_scale,
            torch.zeros_like(noise),
        )

    def random_part(self, model: ModelWeights, generator: random.Random) -> Part:
        images = generator.randint(1, 3)
        return self.part(
            model,
            [generator.randrange(self.shared.network.num_classes) for _ in range(images)],
            [generator.randrange(1000) for _ in range(images)],
            num_inference_steps=generator.randint(1, 7),
            guidance_scale=generator.choice([1.0, 1.5, 4.0]),
            scheduler=generator.choice([*Scheduler]),
        )

    def alone(self, part: Part, kernels: Kernels | None = None) -> Tensor:
        """Its images x when nothing else runs; `part` itself stays as it is."""
        copy = Part(**{**part.__dict__, "x": part.x.clone(), "previous": part.previous.clone()})
        batch = Batch([copy], self.tables, Stack(self.shared), kernels or Kernels())
        for _ in range(batch.steps_left):
            batch.step()
        batch.settle()
        return copy.x

    @staticmethod
    def _add(table: list[Tensor], rows: Tensor) -> int:
        """Where they begin."""
        start = sum(len(other) for other in table)
        table.append(rows.flatten(0, 1) if rows.dim() > 2 else rows)
        return start
