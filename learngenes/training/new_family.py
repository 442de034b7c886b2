"""A new family: train by a configuration, sample a grid, write the files."""

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from learngenes.config import Mode
from learngenes.data.images import grid
from learngenes.family.family import Family, load_family, save_family
from learngenes.model.factors import Scales
from learngenes.model.sampling import sample
from learngenes.training.config import PretrainingConfig
from learngenes.training.network import FactorisedDiT
from learngenes.training.prepare import PREPARATION, prepare
from learngenes.training.pretrain import LOG, Pretraining

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
    """Prepare each depth, and write network, limited data, configuration, log and sample grid."""
    config, images = pretraining.config, pretraining.images
    network.order_components()
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(shutil.SameFileError):  # a shipped family is trained again
        shutil.copy(config_file, directory / "config.toml")
    shutil.copy(pretraining.directory / LOG, directory / LOG)
    manifest = config.manifest(images.class_names, trained_steps)
    manifest["layer_order"] = network.layer_order
    limited = images.balanced(config.data.limited_images)

    def save(depths: Mapping[int, Scales]) -> None:
        encoder = pretraining.encoder
        save_family(directory, manifest, network.genes, network.stem, depths, limited, encoder)

    save(network.trained_depths)
    family = load_family(directory)
    if config.training.preparation_steps:
        depths = _prepared(family.to(pretraining.accelerator.device), pretraining)
        family = dataclasses.replace(family, depths=depths).to(torch.device("cpu"))
    _sample_grid(family).save(directory / "samples.png", optimize=True)
    save(family.depths)


def _prepared(family: Family, pretraining: Pretraining) -> dict[int, Scales]:
    steps = pretraining.config.training.preparation_steps
    preparation = PREPARATION.model_copy(update={"steps": steps})
    with tqdm(total=steps * (len(family.depths) - 1), unit="step") as bar:

        def show(depth: int, _: int, loss: float) -> None:
            bar.set_description(f"Sigma of depth {depth}", refresh=False)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        return prepare(family, pretraining.images, pretraining.directory, preparation, show)


def _sample_grid(family: Family) -> Image.Image:
    """Grid with two images of each of the first classes, a row for some of the depths."""
    manifest, depths = family.manifest, [*family.depths]
    shown = sorted({depths[0], depths[len(depths) // 2], depths[-1]}, reverse=True)
    labels = list(range(min(manifest.network.num_classes, GRID_CLASSES))) * 2
    rows = []
    for depth in shown:
        model = family.assemble(family.depths[depth], Mode.MATERIALISED)
        rows.append(sample(model, manifest.diffusion, labels, range(len(labels))).numpy())
    return grid(rows, scale=2)
