"""Phase 2: U, V and the stem frozen, train one model's Sigma and biases on limited data."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from learngenes.config import Frozen
from learngenes.data import LabelledImages
from learngenes.device import training_precision
from learngenes.diffusion import heldout_loss, noise_process, training_batch
from learngenes.factors import Scales, training_layer
from learngenes.family import Family


class RetrainingConfig(Frozen):
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 3e-3
    max_seconds: float = 60.0
    heldout_images: int = 200
    """At most; never more than a fifth of the data."""
    heldout_every_steps: int = 25
    patience: int = 3
    """Stop after so many held-out losses without a new best one."""
    null_class_probability: float = 0.1
    seed: int = 0


class Progress(Frozen):
    """Told to the callback after every step."""

    step: int
    steps: int
    loss: float
    heldout_loss: float | None


@dataclass(frozen=True)
class Retrained:
    scales: Scales
    """Those with the best held-out loss; the given ones if nothing was better."""
    initial_heldout_loss: float
    heldout_loss: float
    steps: int
    seconds: float


def retrain(
    family: Family,
    scales: Scales,
    config: RetrainingConfig,
    on_progress: Callable[[Progress], None] | None = None,
    data: LabelledImages | None = None,
) -> Retrained:
    """Train `scales` (changed in place) on `data`, by default the family's own.

    `on_progress` is called after every step and may raise to cancel. Training stops after
    `steps`, after `max_seconds`, or when the held-out loss stops falling; the learning rate
    falls along a cosine to whichever of the first two ends is nearer.
    """
    return _Retraining(family, scales, config, data or family.limited_data).run(on_progress)


def split_heldout(data: LabelledImages, most: int) -> tuple[LabelledImages, LabelledImages]:
    """Data to train on, and at most `most` images, the same ones each time, to judge by."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    heldout = min(most, len(data) // 5)
    return data.subset(order[heldout:]), data.subset(order[:heldout])


class _Retraining:
    def __init__(
        self, family: Family, scales: Scales, config: RetrainingConfig, data: LabelledImages
    ) -> None:
        self.family, self.scales, self.config = family, scales, config
        self.device = family.stem.positions.device
        scales.to(self.device).requires_grad_(True)
        self.process = noise_process(family.manifest.diffusion)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.train, held = split_heldout(data, config.heldout_images)
        self.held_images = held.normalised(torch.arange(len(held))).to(self.device)
        self.held_labels = held.labels.to(self.device)

    def run(self, on_progress: Callable[[Progress], None] | None) -> Retrained:
        config = self.config
        optimizer = torch.optim.AdamW(self.scales.parameters(), lr=0.0, weight_decay=0.0)
        started = time.monotonic()
        initial = best = self._heldout_loss()
        best_tensors = self.scales.stacked()
        stale = step = 0
        ended = 0.0
        while ended < 1 and stale < config.patience:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * ended))
            loss = self._step(optimizer)
            step += 1
            ended = max(step / config.steps, (time.monotonic() - started) / config.max_seconds)
            heldout = None
            if step % config.heldout_every_steps == 0 or ended >= 1:
                heldout = self._heldout_loss()
                stale = 0 if heldout < best else stale + 1
                if heldout < best:
                    best, best_tensors = heldout, self.scales.stacked()
            if on_progress is not None:
                on_progress(
                    Progress(step=step, steps=config.steps, loss=loss, heldout_loss=heldout)
                )
        self.scales.requires_grad_(False)
        return Retrained(
            Scales.from_stacked(best_tensors), initial, best, step, time.monotonic() - started
        )

    def _step(self, optimizer: torch.optim.Optimizer) -> float:
        config = self.config
        indices = torch.randint(len(self.train), (config.batch_size,), generator=self.generator)
        labels = self.train.labels[indices].clone()
        dropped = torch.rand(len(labels), generator=self.generator) < config.null_class_probability
        labels[dropped] = self.family.manifest.network.num_classes
        images = self.train.normalised(indices).to(self.device)
        noisy, timesteps, target = training_batch(self.process, images, self.generator)
        loss = F.mse_loss(self._predict(noisy, timesteps, labels.to(self.device)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def _predict(
        self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        layers = [training_layer(self.family.genes, layer) for layer in self.scales.layers()]
        with training_precision(self.device):
            prediction: torch.Tensor = self.family.stem(x, timesteps, class_labels, layers)
        return prediction.float()

    def _heldout_loss(self) -> float:
        return heldout_loss(self._predict, self.process, self.held_images, self.held_labels)
