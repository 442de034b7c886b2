"""FD, held-out loss and class accuracy of a model; see PROTOCOL.md."""

import dataclasses
import functools
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.paper.setting import Setting, Splits
from benchmarks.paper.training import CPU, denoising_loss
from learngenes.config import Scheduler
from learngenes.data.labelled import LabelledImages
from learngenes.device import training_precision
from learngenes.judging.classifier import accuracy, new_classifier, train_classifier
from learngenes.judging.frechet import Gaussian, frechet_distance, gaussian
from learngenes.model.dense import DenseDiT
from learngenes.model.dit import DiT
from learngenes.model.sampling import sample

BATCH = 125

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    setting: Setting
    splits: Splits
    work: Path
    name: str = "fashion"

    def __call__(self, model: DenseDiT | DiT) -> Figures:
        started = time.monotonic()
        return {
            **self.quality(model),
            "loss": round(denoising_loss(model, self.splits.heldout, self.setting), 5),
            "judging_seconds": round(time.monotonic() - started, 1),
        }

    def quality(self, model: DenseDiT | DiT, guidance_scale: float = 1.0) -> Figures:
        """FD and class accuracy of its samples."""
        labels = torch.arange(self.setting.samples) % self.setting.network.num_classes
        sampled = self._sample(model, labels, guidance_scale)
        images = LabelledImages(sampled, labels, self.splits.test.class_names)
        return {
            "fd": round(frechet_distance(self._gaussian(sampled), self.real), 2),
            "class_accuracy": round(accuracy(self.classifier, images), 4),
        }

    def floor(self) -> float:
        """FD of as many training images as there are samples."""
        chosen = self.splits.training.balanced(self.setting.samples)
        return round(frechet_distance(self._gaussian(chosen.images), self.real), 2)

    def _gaussian(self, images: Tensor) -> Gaussian:
        return gaussian(images, self.setting.features)

    def _sample(self, model: DenseDiT | DiT, labels: Tensor, guidance_scale: float) -> Tensor:
        parts = []
        with training_precision(CPU):
            for seeds in torch.arange(len(labels)).split(BATCH):
                part = sample(
                    model,
                    self.setting.diffusion,
                    labels[seeds].tolist(),
                    seeds.tolist(),
                    num_inference_steps=self.setting.sampling_steps,
                    guidance_scale=guidance_scale,
                    scheduler=Scheduler.DPMSOLVER,
                )
                parts.append(part)
        return torch.cat(parts)

    def prepare(self) -> None:
        """What it judges by, kept for other processes."""
        _ = self.real, self.classifier

    @functools.cached_property
    def real(self) -> Gaussian:
        path = self.work / f"{self.name}-{self.setting.features}-features.safetensors"
        if not path.exists():
            made = self._gaussian(self.splits.test.images)
            save_file({"mean": made.mean, "covariance": made.covariance}, path)
        return Gaussian(**load_file(path))

    @functools.cached_property
    def classifier(self) -> torch.nn.Module:
        path = self.work / f"{self.name}-classifier.safetensors"
        if not path.exists():
            images = self.splits.training
            epochs = max(1, self.setting.classifier_images // len(images))
            save_file(train_classifier(images, epochs).state_dict(), path)
        network = new_classifier(len(self.splits.training.class_names))
        network.load_state_dict(load_file(path))
        return network.eval()
