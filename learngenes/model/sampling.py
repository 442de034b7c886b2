"""Sampling images from a model through diffusers' schedulers, with guidance."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learngenes.config import DiffusionConfig, NetworkConfig, Sampling, Scheduler
from learngenes.model.dense import DenseDiT
from learngenes.model.dit import DiT
from learngenes.model.schedulers import diffusers_scheduler

OnStep = Callable[[int, int], None]
"""Callback with (steps done, steps in all) after every step; it may raise to stop."""


def initial_noise(network: NetworkConfig, seeds: Sequence[int]) -> Tensor:
    """Noise (N, C, H, W); each image's comes from its own seed alone, on every device.

    torch's generator of a CPU heeds the lower 32 bits of a seed: the noise of a longer one is the
    sum of two, whose seeds are of its hash.
    """
    shape = (network.in_channels, network.sample_size, network.sample_size)

    def noise(seed: int) -> Tensor:
        if seed < 2**32:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        digest = hashlib.sha256(seed.to_bytes(8, "big")).digest()
        one, other = (noise(int.from_bytes(part, "big")) for part in (digest[:4], digest[4:8]))
        return (one + other) / math.sqrt(2)

    return torch.stack([noise(seed) for seed in seeds])


@torch.inference_mode()
def sample(
    model: DiT | DenseDiT,
    diffusion: DiffusionConfig,
    class_labels: Sequence[int],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 2.0,
    guidance_start: float = 0.0,
    guidance_stop: float = 1.0,
    guide: DiT | DenseDiT | None = None,
    scheduler: Scheduler = Scheduler.DDIM,
    on_step: OnStep = lambda *_: None,
) -> Tensor:
    """One image per (class label, seed), uint8 (N, C, H, W), on the CPU; latents are decoded.

    `guidance_scale` above 1 extrapolates from the null class (arXiv 2207.12598), as in diffusers'
    `DiTPipeline`, or from what `guide` predicts of the same class (arXiv 2406.02507), between the
    two shares of the steps.
    """
    device = model.stem.positions.device
    steps = diffusers_scheduler(diffusion, scheduler, num_inference_steps)
    x = initial_noise(model.config, seeds).to(device) * steps.init_noise_sigma
    labels = torch.tensor(list(class_labels), device=device)
    guided = Sampling(
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_start=guidance_start,
        guidance_stop=guidance_stop,
    ).guided
    none = torch.full_like(labels, model.config.num_classes)
    for index, t in enumerate(steps.timesteps):
        rows = steps.scale_model_input(x, t)
        times = t.to(device).expand(len(rows))
        if index not in guided:
            prediction = model(rows, times, labels)
        else:
            if guide is not None:
                with_class, guiding = model(rows, times, labels), guide(rows, times, labels)
            else:
                both = model(torch.cat([rows] * 2), times.repeat(2), torch.cat([labels, none]))
                with_class, guiding = both.chunk(2)
            prediction = guiding + guidance_scale * (with_class - guiding)
        x = steps.step(prediction, t, x).prev_sample
        on_step(index + 1, num_inference_steps)
    return model.stem.pixels(x)
