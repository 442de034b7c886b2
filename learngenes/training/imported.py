"""Import of a trained DiT, without loss, as the top of a family that shares nothing with it.

Its layers are ordered by what leaving them out costs; its sizes are there at once, by depth and by
bits. U and V, which smaller sizes share, are fitted afterwards (`learngenes.training.condense`).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from learngenes.config import Kind
from learngenes.data.labelled import LabelledImages
from learngenes.device import default_device, training_precision
from learngenes.family.family import Family, load_family, save_family, write_quality
from learngenes.formats.teacher import Teacher
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.factors import DenseLayers, Learngenes, Scales
from learngenes.training.calibrate import calibrate
from learngenes.training.config import PretrainingConfig
from learngenes.training.network import greedy_order
from learngenes.training.pretrain import LOG
from learngenes.training.retrain import RetrainingConfig

GRID_POINTS = 3
"""Depths, of those that the family has, whose losses are measured at once."""


def import_dense(
    teacher: Teacher,
    limited: LabelledImages,
    config: PretrainingConfig,
    order_images: int,
    seconds: float,
    directory: Path,
) -> Family:
    """Write the family that has the teacher's layers and nothing shared yet, and calibrate it.

    `seconds` are what the training of each calibrated size may take. `limited`: images, or latents
    in a family of latents.
    """
    layers = DenseLayers.of(teacher.network.weights())
    drawn = torch.randperm(len(limited), generator=torch.Generator().manual_seed(0))
    order = layer_order(teacher, config, limited.subset(drawn[:order_images]))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / LOG).write_text(json.dumps({"step": 0, "images": 0}) + "\n")
    manifest = config.manifest(limited.class_names, trained_steps=0)
    manifest["imported_order"] = order
    nothing = {layers.depth: _no_scales(config, layers.depth)}
    save_family(
        directory,
        manifest,
        Learngenes(config.network),
        teacher.network.stem,
        nothing,
        limited,
        teacher.encoder,
        imported=layers,
    )
    family = load_family(directory).to(default_device())
    brief = RetrainingConfig(max_seconds=seconds)
    write_quality(directory, calibrate(family, brief, points=GRID_POINTS))
    return load_family(directory)


def layer_order(
    teacher: Teacher, config: PretrainingConfig, images: LabelledImages
) -> tuple[int, ...]:
    """Layers in the order in which they leave, by their loss on `images`."""
    network, device = teacher.network.to(default_device()), default_device()
    x, labels = images.normalised().to(device), images.labels.to(device)
    process, every = noise_process(config.diffusion), list(network.layers)
    depth = len(every)
    with tqdm(total=depth * (depth + 1) // 2 - 1, unit="model", desc="order of layers") as bar:

        def loss(kept: Sequence[int]) -> float:
            def predict(x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
                chosen = [every[layer] for layer in kept]
                prediction: Tensor = network.stem(x, timesteps, class_labels, chosen)
                return prediction

            bar.update()
            with torch.no_grad(), training_precision(device):
                return heldout_loss(predict, process, x, labels)

        return greedy_order(depth, loss, spread=True)


def _no_scales(config: PretrainingConfig, depth: int) -> Scales:
    """Sigma that is not fitted yet."""
    rank, width = config.network.rank, config.network.width
    sigma = {kind: torch.zeros(depth, rank) for kind in Kind}
    bias = {kind: torch.zeros(depth, kind.shape(width)[0]) for kind in Kind}
    return Scales(sigma, bias)
