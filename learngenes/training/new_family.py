"""A new family: train by a configuration, sample a grid, write the files."""

import contextlib
import shutil
from pathlib import Path

from PIL import Image

from learngenes.config import DiffusionConfig, Mode, Size
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
    picture = sample_grid(network, config.diffusion, config.sizes.depths, config.sizes.ranks)
    picture.save(directory / "samples.png", optimize=True)
    save_family(
        directory,
        {
            "name": config.name,
            "network": config.network,
            "diffusion": config.diffusion,
            "sizes": config.sizes,
            "class_names": images.class_names,
            "licence": config.data.licence,
            "trained_steps": trained_steps,
            "seed": config.training.seed,
            "form": config.training.form,
        },
        network.genes,
        network.stem,
        network.scales,
        images.balanced(config.data.limited_images),
        pretraining.encoder,
    )


def sample_grid(
    network: FactorisedDiT,
    diffusion: DiffusionConfig,
    depths: tuple[int, ...],
    ranks: tuple[int, ...],
) -> Image.Image:
    """Grid with two images of each of the first classes, one row per size, unretrained."""
    config = network.stem.config
    middle = Size(depth=depths[len(depths) // 2], rank=ranks[len(ranks) // 2])
    sizes = [
        Size(depth=config.depth, rank=config.rank),
        Size(depth=middle.depth, rank=config.rank),
        middle,
        Size(depth=depths[0], rank=ranks[0]),
    ]
    labels = list(range(min(config.num_classes, GRID_CLASSES))) * 2
    rows = []
    for size in sizes:
        model = DiT(
            network.stem, network.genes, interpolated(network.scales, size), Mode.MATERIALISED
        )
        rows.append(sample(model, diffusion, labels, range(len(labels))).numpy())
    return grid(rows, scale=2)
