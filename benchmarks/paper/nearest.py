"""Whether a family knows its images by heart: samples beside the nearest images it was trained on.

`python -m benchmarks.paper.nearest families/NAME` measures it and draws `nearest.png` there.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.paper.rows import Row
from learngenes import data
from learngenes.config import Mode
from learngenes.family import Family, load_family
from learngenes.pretrain import PretrainingConfig
from learngenes.sampling import sample

SAMPLES = 500
BATCH = 50
COLUMNS = 18
SCALE = 2
CAPTION = 12


def measure(directory: Path, file: Path | None = None) -> Row:
    """Distances in grey levels (root mean square); beside them those of images it never saw."""
    family = load_family(directory)
    config = PretrainingConfig.read(directory / "config.toml").data
    side = family.manifest.network.sample_size
    train, test = (
        data.load(config.path, split, family.manifest.class_names, side)
        for split in ("train", "test")
    )
    samples = _samples(family)
    sampled, at = nearest(samples, train.images)
    unseen, _ = nearest(test.balanced(SAMPLES).images, train.images)
    if file is not None:
        draw(samples[:COLUMNS], train.images[at[:COLUMNS]], sampled[:COLUMNS], file)
    copied = sampled < unseen.quantile(0.01)
    return {
        "samples": SAMPLES,
        "nearest_median": round(float(sampled.median()), 2),
        "nearest_median_of_unseen": round(float(unseen.median()), 2),
        "nearer_than_all_but_one_percent_of_unseen": round(float(copied.float().mean()), 4),
    }


def _samples(family: Family) -> Tensor:
    """At full size, classes in turn, as the service samples by default."""
    model = family.assemble(family.scales, Mode.MATERIALISED)
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


def draw(samples: Tensor, neighbours: Tensor, distances: Tensor, file: Path) -> None:
    """Samples above, the nearest training image of each below, and how far they are apart."""
    side = samples.shape[2] * SCALE
    sheet = Image.new("RGB", (side * len(samples), 2 * side + CAPTION), "white")
    pen = ImageDraw.Draw(sheet)
    for column, pair in enumerate(zip(samples, neighbours, strict=True)):
        for row, image in enumerate(pair):
            pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
            picture = Image.fromarray(pixels).convert("RGB")
            resized = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(resized, (column * side, row * side))
        pen.text((column * side + 2, 2 * side), f"{distances[column]:.0f}", fill="black")
    sheet.save(file, optimize=True)


if __name__ == "__main__":
    chosen = Path(sys.argv[1])
    sys.stdout.write(f"{measure(chosen, chosen / 'nearest.png')}\n")
