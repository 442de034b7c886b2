"""Parts of a batch as the sampling engine makes them, without an engine."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from learngenes.config import SHARED_MODES, Mode, Sampling, Scheduler, Size
from learngenes.family.family import Family
from learngenes.model.factors import Scales
from learngenes.model.sampling import initial_noise
from learngenes.stepping.batch import Batch, Part, Stack, Tables
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.schedules import schedule
from learngenes.stepping.weights import FactoredWeights, ModelWeights, SharedWeights, kept


def other_scales(family: Family, size: Size, seed: int) -> Scales:
    """Scales of that size which have little in common with other seeds' ones."""
    scales = family.scales_of(size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for sigma in scales.sigma.values():
            sigma.add_(torch.randn(sigma.shape, generator=generator), alpha=0.3)
    return scales


def weights(shared: SharedWeights, scales: Scales, mode: Mode) -> ModelWeights:
    own = kept(scales, shared.family, mode, shared.dtype)
    model = ModelWeights.of(shared, own)
    if mode is Mode.MATERIALISED and isinstance(model, FactoredWeights):
        model.materialise()
    return model


def random_models(
    shared: SharedWeights,
    count: int,
    generator: random.Random,
    modes: Sequence[Mode] = SHARED_MODES,
) -> list[ModelWeights]:
    """Models of the family's own depths and any rank; in few bits groups are those of one."""
    family, few = shared.family, shared.dtype.bits is not None
    models = []
    for seed in range(count):
        mode = Mode.FACTORED if few else generator.choice(modes)
        rank = shared.network.rank if few else generator.randint(1, shared.network.rank)
        size = Size(depth=generator.choice(family.manifest.sizes.depths), rank=rank)
        models.append(weights(shared, other_scales(family, size, seed), mode))
    return models


@dataclass
class Desk:
    """Makes parts, and keeps the tables that they look things up in."""

    shared: SharedWeights
    coefficients: list[Tensor] = field(default_factory=list)
    modulations: list[Tensor] = field(default_factory=list)

    def batch(
        self, parts: Sequence[Part], kernels: Kernels | None = None, stack: Stack | None = None
    ) -> Batch:
        tables = Tables(torch.cat(self.coefficients), torch.cat(self.modulations))
        return Batch(parts, tables, stack or Stack(self.shared), kernels or Kernels())

    def run(self, parts: Sequence[Part], steps: int = 1, kernels: Kernels | None = None) -> None:
        batch = self.batch(parts, kernels)
        for left in range(steps - 1, -1, -1):
            batch.step()
            if left and batch.is_over:
                batch.settle()
                batch = self.batch(parts, kernels)
        batch.settle()

    def model(self, mode: Mode, depth: int = 2, seed: int = 0, rank: int = 24) -> ModelWeights:
        size = Size(depth=depth, rank=rank)
        return weights(self.shared, other_scales(self.shared.family, size, seed), mode)

    def part(
        self,
        model: ModelWeights,
        class_labels: Sequence[int],
        seeds: Sequence[int],
        *,
        guide: ModelWeights | None = None,
        num_inference_steps: int = 4,
        scheduler: Scheduler = Scheduler.DDIM,
        **guidance: float,
    ) -> Part:
        """`guide` guides the part; by default the model does, without a class."""
        sampling = Sampling(
            num_inference_steps=num_inference_steps, scheduler=scheduler, **guidance
        )
        diffusion = self.shared.family.manifest.diffusion
        steps = schedule(diffusion, scheduler, num_inference_steps)

        def places(model: ModelWeights, labels: Sequence[int]) -> list[int]:
            at = {
                label: self._add(self.modulations, model.modulations(steps.timesteps, label))
                for label in dict.fromkeys(labels)
            }
            return [at[label] for label in labels]

        null = [self.shared.network.num_classes] * len(class_labels)
        guiding = places(guide, class_labels) if guide else places(model, null)
        noise = initial_noise(self.shared.network, seeds)
        return Part(
            model,
            steps,
            self._add(self.coefficients, steps.coefficients),
            places(model, class_labels),
            sampling.guided,
            guide or model,
            guiding if sampling.guided else [],
            sampling.guidance_scale,
            noise * steps.initial_scale,
            torch.zeros_like(noise),
        )

    def random_part(self, model: ModelWeights, generator: random.Random) -> Part:
        images = generator.randint(1, 3)
        start = generator.choice([0.0, 0.3, 0.5])
        smaller = self.model(generator.choice(SHARED_MODES), 2, rank=8)
        return self.part(
            model,
            [generator.randrange(self.shared.network.num_classes) for _ in range(images)],
            [generator.randrange(1000) for _ in range(images)],
            num_inference_steps=generator.randint(1, 7),
            guidance_scale=generator.choice([1.0, 1.5, 4.0]),
            guidance_start=start,
            guidance_stop=generator.choice([1.0, start + 0.4]),
            guide=smaller if generator.random() < 0.3 else None,
            scheduler=generator.choice([*Scheduler]),
        )

    def alone(self, part: Part, kernels: Kernels | None = None) -> Tensor:
        """Images x of `part` when nothing else runs; `part` itself stays as it is."""
        copy = replace(part, x=part.x.clone(), previous=part.previous.clone())
        self.run([copy], len(part.schedule), kernels)
        return copy.x

    @staticmethod
    def _add(table: list[Tensor], rows: Tensor) -> int:
        start = sum(len(other) for other in table)
        table.append(rows.flatten(0, 1) if rows.dim() > 2 else rows)
        return start
