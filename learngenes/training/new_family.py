"""A new family: train by a configuration, sample a grid, write the files."""

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from learngenes.config import Mode
from learngenes.data.images import grid
from learngenes.family.family import Family, Precision, load_family, save_family
from learngenes.model.factors import Scales
from learngenes.model.sampling import sample
from learngenes.training.config import PretrainingConfig
from learngenes.training.network import FactorisedDiT
from learngenes.training.prepare import HEALED, HEALING, PREPARATION, heal, prepare
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
    imported_order: Sequence[int] = (),
) -> None:
    """Prepare each depth, and write network, limited data, configuration, log and sample grid.

    `imported_order` is that of imported layers, which are in `directory` already.
    """
    config, images = pretraining.config, pretraining.images
    network.order_components()
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(shutil.SameFileError):  # a shipped family is trained again
        shutil.copy(config_file, directory / "config.toml")
    shutil.copy(pretraining.directory / LOG, directory / LOG)
    manifest = config.manifest(images.class_names, trained_steps)
    manifest["layer_order"] = network.layer_order
    manifest["imported_order"] = imported_order
    limited = images.balanced(config.data.limited_images)

    def save(
        depths: Mapping[int, Scales], healed: Mapping[Precision, Mapping[int, Scales]]
    ) -> None:
        encoder, genes, stem = pretraining.encoder, network.genes, network.stem
        save_family(directory, manifest, genes, stem, depths, limited, encoder, healed)

    save(network.trained_depths, {})
    family = _prepared(load_family(directory), pretraining)
    _sample_grid(family).save(directory / "samples.png", optimize=True)
    save(family.depths, family.healed)


def _prepared(family: Family, pretraining: Pretraining) -> Family:
    """The family with Sigma of each depth trained alone, and healed for few bits."""
    training, depths = pretraining.config.training, len(family.depths)
    stages = training.preparation_steps, training.healing_steps
    preparation, healing = (
        config.model_copy(update={"steps": steps})
        for config, steps in zip((PREPARATION, HEALING), stages, strict=True)
    )
    data, work = pretraining.images, pretraining.directory
    total = stages[0] * depths + stages[1] * depths * len(HEALED)
    family = family.to(pretraining.accelerator.device)
    with tqdm(total=total, unit="step") as bar:

        def show(name: str, _: int, loss: float) -> None:
            bar.set_description(f"Sigma of {name}", refresh=False)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        if training.preparation_steps:
            owns = prepare(family, data, work, preparation, show)
            family = dataclasses.replace(family, depths=owns)
        if training.healing_steps:
            healed = heal(family, data, work, healing, show)
            family = dataclasses.replace(family, healed=healed)
    return family.to(torch.device("cpu"))


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
