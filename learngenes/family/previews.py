"""A sheet of what every size of a family samples before its Sigma is retrained."""

from collections.abc import Callable
from pathlib import Path

import torch

from learngenes.config import Mode, Size
from learngenes.data.images import grid
from learngenes.family.family import PREVIEWS_FILE, Family, FamilyError
from learngenes.model.sampling import sample

ROWS = 32
"""Number of images in one batch."""


def write_previews(
    family: Family, directory: Path, on_size: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """Write previews.png: a row for each depth and rank, one class in each column.

    A class has the same seed at every size: its own number. `on_size` is called with
    (sizes done, in all). Raises FamilyError where nothing shared is trained.
    """
    if family.imported is not None and not family.manifest.trained_steps:
        raise FamilyError(f"{directory} shares nothing yet: previews come once it is distilled")
    space = family.manifest.sizes
    sizes = [Size(depth=depth, rank=rank) for depth in space.depths for rank in space.ranks]
    labels = list(range(len(family.manifest.class_names)))
    rows = []
    for done, size in enumerate(sizes, start=1):
        model = family.assemble(family.scales_of(size), Mode.MATERIALISED)
        batches = [
            sample(model, family.manifest.diffusion, some, seeds=some)
            for some in (labels[i : i + ROWS] for i in range(0, len(labels), ROWS))
        ]
        rows.append(torch.cat(batches).numpy())
        on_size(done, len(sizes))
    file = directory / PREVIEWS_FILE
    grid(rows).save(file, optimize=True)
    return file
