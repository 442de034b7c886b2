"""Images and configurations of trainings that take a moment."""

import json
from pathlib import Path

from PIL import Image

from learngenes.data.labelled import LabelledImages

Settings = dict[str, object]
"""Values by their dotted names in a configuration."""


def under(table: str, **values: object) -> Settings:
    return {f"{table}.{name}": value for name, value in values.items()}


DATA = under("data", limited_images=40, heldout_images=20, licence="made by a test")

BRIEFLY = under("training", preparation_steps=2, healing_steps=1)


def write_config(file: Path, images: Path, *settings: Settings) -> Path:
    """Write a configuration, on the images of a folder; later settings win."""
    merged: Settings = {"data.path": str(images), **DATA, **BRIEFLY}
    for some in settings:
        merged |= some
    file.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in merged.items()))
    return file


def image_folder(data: LabelledImages, path: Path) -> Path:
    """Write the same images as a training and as a test split."""
    for split in ("train", "test"):
        for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            folder = path / split / data.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return path
