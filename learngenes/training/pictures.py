"""Measure what the pictures of a family are worth, by size and by sampling."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from learngenes.config import DType, Mode, Sampling, Scheduler, Size, SizeSpace
from learngenes.data.images import DataError
from learngenes.data.labelled import LabelledImages, load
from learngenes.device import training_precision
from learngenes.family.family import Family
from learngenes.judging.classifier import accuracy, train_classifier
from learngenes.judging.frechet import Gaussian, frechet_distance, gaussian
from learngenes.model.factors import Own
from learngenes.model.sampling import sample
from learngenes.sizing.quality import Pictures, PictureTable, QualityTable

COUNT = 5_000
"""Pictures of which a distance is."""
STEPS = (4, 7, 12)
GUIDANCE_SCALE = 2.0
INTERVAL = 0.2, 0.8
"""Interval of the steps in which the class is guided for."""
BATCH = 125
CLASSIFIER_IMAGES = 120_000
"""Images, counted as often as they are seen, that the classifier is trained on."""
OnPictures = Callable[[Size, Sampling, float, float], None]
"""Callback with (the size, the sampling, its distance, its class accuracy)."""


@dataclass(frozen=True)
class Judge:
    """Real images, as far as pictures are compared with them."""

    real: Gaussian
    classifier: nn.Module
    class_names: tuple[str, ...]
    floor: float
    """Distance of as many other real images."""
    accuracy_of_real: float
    """Share of the held-out images whose class the classifier finds."""

    @classmethod
    def of(cls, training: LabelledImages, heldout: LabelledImages, count: int) -> "Judge":
        """Pictures are compared with the held-out images."""
        epochs = max(1, CLASSIFIER_IMAGES // len(training))
        real, classifier = gaussian(heldout.images), train_classifier(training, epochs)
        return cls(
            real=real,
            classifier=classifier,
            class_names=training.class_names,
            floor=frechet_distance(gaussian(training.balanced(count).images), real),
            accuracy_of_real=accuracy(classifier, heldout),
        )

    def judged(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Distance and class accuracy of pictures (N, C, H, W)."""
        pictures = LabelledImages(images, labels, self.class_names)
        distance = frechet_distance(gaussian(images), self.real)
        return distance, accuracy(self.classifier, pictures)


def candidates(sizes: SizeSpace, full: Size) -> tuple[Sampling, ...]:
    """Samplings among which plans are to choose: unguided, guided for the class in the middle of
    the steps, and guided by the shallowest size.
    """
    guide = Size(depth=sizes.depths[0], rank=min(sizes.ranks[-1], full.rank))
    middle = {"guidance_start": INTERVAL[0], "guidance_stop": INTERVAL[1]}
    return tuple(
        Sampling(num_inference_steps=steps, scheduler=Scheduler.DPMSOLVER, **guidance)
        for steps in STEPS
        for guidance in (
            {"guidance_scale": 1.0},
            {"guidance_scale": GUIDANCE_SCALE, **middle},
            {"guidance_scale": GUIDANCE_SCALE, "guide": guide},
        )
    )


def sampled(family: Family, own: Own, sampling: Sampling, labels: Tensor) -> Tensor:
    """Pictures (N, C, H, W) of a model in float32, one for each class of `labels`; seeds 0, 1, …"""
    guide = None
    if sampling.guide is not None and sampling.guided:
        guide = family.assemble(family.scales_of(sampling.guide), Mode.MATERIALISED, DType.FLOAT32)
    model = family.assemble(own, Mode.MATERIALISED, DType.FLOAT32)
    parts = []
    with training_precision(family.stem.positions.device):
        for seeds in torch.arange(len(labels)).split(BATCH):
            part = sample(
                model,
                family.manifest.diffusion,
                labels[seeds].tolist(),
                seeds.tolist(),
                **{**dict(sampling), "guide": guide},
            )
            parts.append(part)
    return torch.cat(parts)


@dataclass(frozen=True)
class PicturesConfig:
    """What is measured of pictures."""

    judge: Judge
    samplings: tuple[Sampling, ...]
    count: int = COUNT
    work: Path | None = None
    """File in which results are kept as they come, so that another run goes on; None for none."""


def pictures_config(family: Family, data: Path, work: Path | None = None) -> PicturesConfig:
    """What is measured of a family by its real images, `train` and `test`. Raises DataError, and
    FeaturesMissing.
    """
    manifest = family.manifest
    training, heldout = (
        load(data, split, manifest.class_names, manifest.network.image_size)
        for split in ("train", "test")
    )
    if training.class_names != manifest.class_names:
        raise DataError(f"{data} has other classes than the family {manifest.name}")
    judge = Judge.of(training, heldout, COUNT)
    return PicturesConfig(judge, candidates(manifest.sizes, family.full_size), work=work)


class Measurements:
    """Distances and accuracies by size and sampling, of one family and one number of pictures."""

    def __init__(self, family: Family, config: PicturesConfig, on_pictures: OnPictures) -> None:
        self._family, self._config, self._on_pictures = family, config, on_pictures
        self._labels = torch.arange(config.count) % len(config.judge.class_names)
        self._kept: dict[str, tuple[float, float]] = {}
        if config.work is not None and config.work.exists():
            for line in config.work.read_text().splitlines():
                self._kept |= json.loads(line)

    def of(self, size: Size, own: Own, sampling: Sampling) -> tuple[float, float]:
        key = json.dumps([self._family.fingerprint, self._config.count, str(size), str(sampling)])
        if key not in self._kept:
            pictures = sampled(self._family, own, sampling, self._labels)
            self._kept[key] = self._config.judge.judged(pictures, self._labels)
            if self._config.work is not None:
                with self._config.work.open("a") as file:
                    file.write(json.dumps({key: self._kept[key]}) + "\n")
        distance, accuracy = self._kept[key]
        self._on_pictures(size, sampling, distance, accuracy)
        return distance, accuracy


def measure_pictures(
    family: Family,
    table: QualityTable,
    models: Mapping[Size, Own],
    between: Mapping[Size, Own],
    config: PicturesConfig,
    on_pictures: OnPictures = lambda *_: None,
) -> Pictures:
    """Distances and accuracies of `models` over the grid of `table`, and the error at sizes that
    lie `between` them.
    """
    measurements = Measurements(family, config, on_pictures)
    worths: dict[Sampling, dict[Size, tuple[float, float]]] = {}
    unguided: dict[tuple[int, Size], tuple[float, float]] = {}
    for sampling in sorted(config.samplings, key=lambda each: bool(each.guided)):
        worths[sampling] = {}
        for size, own in models.items():
            plain = unguided.get((sampling.num_inference_steps, size))
            if sampling.guide is not None and not sampling.guide.smaller_than(size) and plain:
                worths[sampling][size] = plain  # no size guides itself
            else:
                worths[sampling][size] = measurements.of(size, own, sampling)
            if not sampling.guided:
                unguided[sampling.num_inference_steps, size] = worths[sampling][size]

    def rows(sampling: Sampling, which: int) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(worths[sampling][Size(depth=depth, rank=rank)][which] for rank in table.ranks)
            for depth in table.depths
        )

    made = Pictures(
        floor=config.judge.floor,
        count=config.count,
        tables=tuple(
            PictureTable(
                sampling=sampling, distances=rows(sampling, 0), accuracies=rows(sampling, 1)
            )
            for sampling in config.samplings
        ),
        heldout_error=0.0,
        accuracy_of_real=config.judge.accuracy_of_real,
        source=f"FD-EffLite0 of {config.count} pictures in float32 to the images that are held out",
    )
    known = table.model_copy(update={"pictures": made})
    errors = [0.0] if not between else []
    for size, own in between.items():
        for sampling in config.samplings:
            if sampling.guide is None or sampling.guide.smaller_than(size):
                measured, _ = measurements.of(size, own, sampling)
                found = known.distances([sampling], np.array([size.depth]), np.array([size.rank]))
                assert found is not None
                errors.append(abs(float(found[0][0, 0]) / measured - 1))
    return made.model_copy(update={"heldout_error": float(np.median(errors))})
