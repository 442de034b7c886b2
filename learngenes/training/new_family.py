"""A new family: train by a configuration, sample a grid, write the files."""

import contextlib
import shutil
from pathlib import Path

from PIL import Image

from learngenes.config import Mode, Size
from learngenes.data.images import grid
from learngenes.family.family import Family, load_family, save_family
from learngenes.model.dit import DiT
from learngenes.model.sampling import sample
from learngenes.model.sigma import interpolated
from learngenes.training.config import PretrainingConfig
from learngenes.training.pretrain import LOG, FactorisedDiT, Pretraining

GRID_CLASSES = 10


def pretrain_family(
    config_file: Path, work: Path, directory: Path, start: Path | None = None
) -> Family:
    """Run (or resume) phase 1, from the weights of `start`, and write the family to `directory`."""
    config = PretrainingConfig.read(config_file)
    pretraining = Pretraining(config, work, start)
    network = pretraining.run().cpu().eval().requires_grad_(False)
    if pretraining.accelerator.is_main_process:
        steps = pretraining.before.steps + pretraining.step
        write_family(pretraining, config_file, network, steps, directory)
    pretraining.accelerator.wait_for_everyone()
    return load_family(directory)


def write_family(
    pretraining: Pretraining,
    config_file: Path,
    network: FactorisedDiT,
    trained_steps: int,
    directory: Path,
) -> None:
    """Write network, limited data, configuration, training log and sample grid."""
    config, images = pretraining.config, pretraining.images
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(shutil.SameFileError):  # a shipped family is trained again
        shutil.copy(config_file, directory / "config.toml")
    shutil.copy(pretraining.directory / LOG, directory / LOG)
    _sample_grid(network, config).save(directory / "samples.png", optimize=True)
    manifest = config.manifest(images.class_names, trained_steps)
    genes, stem, scales = network.genes, network.stem, network.scales
    limited = images.balanced(config.data.limited_images)
    save_family(directory, manifest, genes, stem, scales, limited, pretraining.encoder)


def _sample_grid(network: FactorisedDiT, config: PretrainingConfig) -> Image.Image:
    """Grid with two images of each of the first classes, one row per size, unretrained."""
    full, middle = config.network.full_size, config.sizes.middle
    shallower = Size(depth=middle.depth, rank=full.rank)
    labels = list(range(min(config.network.num_classes, GRID_CLASSES))) * 2
    rows = []
    for size in (full, shallower, middle, config.sizes.smallest):
        scales = interpolated(network.scales, size)
        model = DiT(network.stem, network.genes, scales, Mode.MATERIALISED)
        rows.append(sample(model, config.diffusion, labels, range(len(labels))).numpy())
    return grid(rows, scale=2)
