"""Check 3: the family of latents: what its autoencoder loses, and where the time goes."""

import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.parts import REPOSITORY, RESULTS, Figures
from learngenes.config import Mode, Size
from learngenes.data import labelled
from learngenes.data.images import grid
from learngenes.family.family import Family, load_family
from learngenes.model.sampling import sample

IMAGES, STEPS, ROUNDS = 8, 25, 7
SHOWN = 18


def measure(directory: Path = REPOSITORY / "families" / "emoji-latents") -> Figures:
    family = load_family(directory)
    network = family.manifest.network
    path = REPOSITORY / "var" / "data" / "emoji-64"
    test = labelled.load(path, "test", (), network.image_size)
    latents = family.encoded(test)
    decoded = family.stem.pixels(latents.normalised(torch.arange(len(latents))))
    error = (decoded.float() - test.images.float()) / 255
    classes = len(test.class_names)
    turns = [(test.labels == i % classes).nonzero()[i // classes, 0] for i in range(SHOWN)]
    shown = torch.stack(turns)  # every class twice, as the samples below them
    rows = [test.images[shown], decoded[shown], *_samples(family)]
    grid([row.numpy() for row in rows]).save(RESULTS / "interop-latents.png", optimize=True)
    return {
        "test_images": len(test),
        "compression": test.images[0].numel() / latents.images[0].numel(),
        "mean_absolute_error": round(float(error.abs().mean()), 4),
        "psnr_db": round(float(-10 * error.square().flatten(1).mean(1).log10().mean()), 1),
        **_stages(family),
    }


def _samples(family: Family) -> list[torch.Tensor]:
    """Images of the full size, and of one of half depth and half rank; every class twice."""
    classes, full = len(family.manifest.class_names), family.full_size
    labels = [i % classes for i in range(SHOWN)]
    sizes = (full, Size(depth=full.depth // 2, rank=full.rank // 2))
    return [
        sample(
            family.assemble(family.scales_of(size), Mode.MATERIALISED),
            family.manifest.diffusion,
            labels,
            range(SHOWN),
        )
        for size in sizes
    ]


def _stages(family: Family) -> Figures:
    """Medians of a guided request at full size."""
    model = family.assemble(family.scales, Mode.MATERIALISED)
    whole, decoding = [], []
    labels, network = [0] * IMAGES, family.manifest.network
    shape = (IMAGES, network.in_channels, network.sample_size, network.sample_size)
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        sample(model, family.manifest.diffusion, labels, range(IMAGES), num_inference_steps=STEPS)
        whole.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        family.stem.pixels(torch.zeros(shape))
        decoding.append(time.perf_counter() - begun)
    total, last = float(np.median(whole)), float(np.median(decoding))
    return {
        "images": IMAGES,
        "steps": STEPS,
        "denoising_seconds": round(total - last, 3),
        "decoding_seconds": round(last, 3),
    }
