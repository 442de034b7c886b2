"""FD, held-out loss and class accuracy of a model; see PROTOCOL.md."""

import dataclasses
import functools
import time

import torch
from torch import Tensor

from benchmarks.classifier import accuracy, train_classifier
from benchmarks.paper.setting import Setting, Splits
from benchmarks.paper.training import CPU, denoising_loss
from learngenes.data import LabelledImages
from learngenes.dense import DenseDiT
from learngenes.device import training_precision
from learngenes.frechet import Gaussian, frechet_distance, gaussian
from learngenes.sampling import sample

BATCH = 250

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    setting: Setting
    splits: Splits

    def __call__(self, model: DenseDiT) -> Figures:
        started = time.monotonic()
        classes = self.setting.network.num_classes
        labels = torch.arange(self.setting.samples) % classes
        images = LabelledImages(self._sample(model, labels), labels, self.splits.test.class_names)
        return {
            "fd": round(frechet_distance(gaussian(images.images), self._real), 2),
            "loss": round(denoising_loss(model, self.splits.heldout, self.setting), 5),
            "class_accuracy": round(accuracy(self._classifier, images), 4),
            "judging_seconds": round(time.monotonic() - started, 1),
        }

    def floor(self) -> float:
        """FD of as many training images as there are samples."""
        chosen = self.splits.training.balanced(self.setting.samples)
        return round(frechet_distance(gaussian(chosen.images), self._real), 2)

    def _sample(self, model: DenseDiT, labels: Tensor) -> Tensor:
        parts = []
        with training_precision(CPU):
            for seeds in torch.arange(len(labels)).split(BATCH):
                part = sample(
                    model,
                    self.setting.diffusion,
                    labels[seeds].tolist(),
                    seeds.tolist(),
                    num_inference_steps=self.setting.sampling_steps,
                    guidance_scale=1.0,
                    scheduler="dpmsolver++",
                )
                parts.append(part)
        return torch.cat(parts)

    @functools.cached_property
    def _real(self) -> Gaussian:
        return gaussian(self.splits.test.images)

    @functools.cached_property
    def _classifier(self) -> torch.nn.Module:
        return train_classifier(self.splits.training)
