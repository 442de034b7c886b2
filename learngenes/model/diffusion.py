"""The noise process of training, through diffusers' scheduler, and its loss."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from learngenes.config import DiffusionConfig
from learngenes.lazily import from_diffusers

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Network: (noisy (N, C, H, W), timesteps (N,), class_labels (N,)) -> prediction (N, C, H, W)."""


def noise_process(config: DiffusionConfig) -> "DDPMScheduler":
    made: DDPMScheduler = from_diffusers("DDPMScheduler")(**config.model_dump())
    return made


def step_generator(stream: int, step: int) -> torch.Generator:
    """Generator for the draws of one training step, independent of other streams.

    torch uses 32 bits of a seed: streams are a golden section of them apart.
    """
    return torch.Generator().manual_seed((stream * 2_654_435_769 + step) % 2**32)


def training_batch(
    process: "DDPMScheduler", images: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, their timesteps and the target, for clean `images` (N, C, H, W).

    The timesteps of a batch are evenly spread from a random start (arXiv 2107.00630, appendix
    I.1): the loss varies less from batch to batch than with independent ones.
    """
    n, steps = len(images), process.config["num_train_timesteps"]
    start = torch.rand((), generator=generator, dtype=torch.float64)
    spread = (torch.arange(n, dtype=torch.float64) + start) * steps / n
    timesteps = spread.long().clamp(max=steps - 1)[torch.randperm(n, generator=generator)]
    return _noised(process, images, timesteps.to(images.device), generator)


def _noised(
    process: "DDPMScheduler", images: Tensor, timesteps: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    noisy = process.add_noise(images, noise, timesteps)
    if process.config["prediction_type"] == "v_prediction":
        return noisy, timesteps, process.get_velocity(images, noise, timesteps)
    return noisy, timesteps, noise


@torch.no_grad()
def heldout_loss(
    predict: Predict,
    process: "DDPMScheduler",
    images: Tensor,
    labels: Tensor,
    batch_size: int = 256,
) -> float:
    """Mean squared error at fixed timesteps and noise: the cheap proxy for quality."""
    generator = torch.Generator().manual_seed(0)
    steps = process.config["num_train_timesteps"]
    drawn = torch.randint(0, steps, (len(images),), generator=generator).to(images.device)
    noisy, timesteps, target = _noised(process, images, drawn, generator)
    total = 0.0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        prediction = predict(noisy[part], timesteps[part], labels[part])
        total += F.mse_loss(prediction.float(), target[part], reduction="sum").item()
    return total / target.numel()
