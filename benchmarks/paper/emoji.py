"""The family `emoji`: other styles as tasks of its Sigma, and whether it knows images by heart.

In one process with a thread for each core: nothing else should run.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.paper.rows import Row, Rows, version
from benchmarks.parts import REPOSITORY, RESULTS
from learngenes.config import Mode
from learngenes.data import labelled
from learngenes.data.images import grid
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.dit import DiT
from learngenes.model.sampling import sample
from learngenes.training.retrain import RetrainingConfig, retrain

DATA = REPOSITORY / "var" / "data"
PICTURE = RESULTS / "emoji.png"
STYLES = {"emoji": "Noto", "emoji-twitter": "Twemoji", "emoji-fluent": "Fluent 3D"}
"""Image folders that `families/prepare/emoji.py` makes; the family's own is the first."""
STEPS = 1000
SAMPLES = 500
BATCH = 50
COLUMNS = 18
SCALE = 2
CAPTION = 14


@dataclass(frozen=True)
class Style:
    name: str
    train: LabelledImages
    test: LabelledImages


@dataclass(frozen=True)
class Pairs:
    """Samples (N, C, H, W), for each the nearest training image and how far it is, (N,)."""

    samples: Tensor
    neighbours: Tensor
    distances: Tensor


def load_styles(family: Family) -> list[Style]:
    """Raises DataError when the data are not there."""
    names, side = family.manifest.class_names, family.manifest.network.sample_size
    return [
        Style(
            name, *(labelled.load(DATA / folder, part, names, side) for part in ("train", "test"))
        )
        for folder, name in STYLES.items()
    ]


def measure(rows: Rows, family: Family, styles: list[Style], file: Path = PICTURE) -> None:
    """A row for each style, its own first; the picture of them all is drawn if any is new."""
    of = {"family": version(family)}
    keys: list[Row] = [{"style": style.name, **of} for style in styles]
    if all(rows.has(key) for key in keys):
        return
    drawn = []
    for key, style in zip(keys, styles, strict=True):
        row, pairs = judged(family, style, steps=STEPS if style is not styles[0] else 0)
        rows.get(key, lambda row=row: row)  # type: ignore[misc]
        drawn.append((style.name, pairs))
    draw(drawn, file)


def judged(family: Family, style: Style, *, steps: int) -> tuple[Row, Pairs]:
    """After `steps` of Sigma alone, on the style's training images."""
    scales = copy.deepcopy(family.scales)
    before = _loss(family.assemble(scales, Mode.MATERIALISED), family, style)
    if steps:
        config = RetrainingConfig(steps=steps, max_seconds=float("inf"), patience=steps)
        retrain(family, scales, config, data=style.train)
    model = family.assemble(scales, Mode.MATERIALISED)
    known, pairs = compared(_samples(model, family), style)
    row = {
        "images": len(style.train),
        "steps": steps,
        "loss_before": before,
        "loss": _loss(model, family, style),
        **known,
    }
    return row, pairs


def compared(samples: Tensor, style: Style) -> tuple[Row, Pairs]:
    """How near they are to what was trained on; beside it that of as many unseen images.

    Distances are root mean squares, in grey levels.
    """
    distances, places = nearest(samples, style.train.images)
    unseen, _ = nearest(style.test.balanced(SAMPLES).images, style.train.images)
    copies = distances < unseen.quantile(0.01)
    row = {
        "samples": SAMPLES,
        "nearest_median": round(float(distances.median()), 1),
        "nearest_median_of_unseen": round(float(unseen.median()), 1),
        "nearer_than_99_percent_of_unseen": round(float(copies.float().mean()), 4),
    }
    return row, Pairs(samples, style.train.images[places], distances)


def _loss(model: DiT, family: Family, style: Style) -> float:
    process, images = noise_process(family.manifest.diffusion), style.test
    everything = images.normalised(torch.arange(len(images)))
    return round(heldout_loss(model, process, everything, images.labels), 5)


def _samples(model: DiT, family: Family) -> Tensor:
    """Classes in turn, as the service samples by default."""
    labels = torch.arange(SAMPLES) % len(family.manifest.class_names)
    parts = [
        sample(model, family.manifest.diffusion, labels[seeds].tolist(), seeds.tolist())
        for seeds in torch.arange(SAMPLES).split(BATCH)
    ]
    return torch.cat(parts)


def nearest(images: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) distance of each image to the nearest, in grey levels, and where that is."""
    flat = among.flatten(1).float()
    distances, places = zip(
        *(torch.cdist(part.flatten(1).float(), flat).min(1) for part in images.split(BATCH)),
        strict=True,
    )
    return torch.cat(distances) / flat.shape[1] ** 0.5, torch.cat(places)


def draw(styles: list[tuple[str, Pairs]], file: Path) -> None:
    """Draw samples of each style, below each its nearest training image and the distance."""
    side = styles[0][1].samples.shape[2] * SCALE
    height = 2 * side + 2 * CAPTION
    columns = min(COLUMNS, len(styles[0][1].samples))
    sheet = Image.new("RGB", (side * columns, height * len(styles)), "white")
    pen = ImageDraw.Draw(sheet)
    for block, (name, pairs) in enumerate(styles):
        top = block * height
        pen.text((2, top), f"{name}: samples, and the nearest training images", fill="black")
        rows = [images[:columns].numpy() for images in (pairs.samples, pairs.neighbours)]
        sheet.paste(grid(rows, SCALE), (0, top + CAPTION))
        for column, distance in enumerate(pairs.distances[:columns]):
            pen.text((column * side + 2, top + CAPTION + 2 * side), f"{distance:.0f}", "grey")
    sheet.save(file, optimize=True)
