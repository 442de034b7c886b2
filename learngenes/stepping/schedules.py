"""Noise schedulers as tables, so that one tensor operation steps rows of different ones.

They do what those of diffusers do (`learngenes.model.schedulers`), which a test compares, and
need none of it: to import it takes seconds of a start.

Each of them is linear in what it holds. With x the noisy image, scaled as under a
variance-preserving process, and x0 what a prediction says of the clean one:

    x0   = x0_x * x + x0_prediction * prediction
    next = next_x * x + next_x0 * x0 + next_previous * (x0 of the step before)

DDIM (arXiv 2010.02502, eta 0) and Euler (arXiv 2206.00364, algorithm 2 without churn) are the
same step between other noise levels; DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) also
looks one step back.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from learngenes.config import DiffusionConfig, Scheduler

BETAS = 0.0001, 0.02
"""First and last beta of the linear schedules: diffusers' defaults."""
MOST_BETA = 0.999
"""Of the cosine schedule, whose last beta would be 1 (arXiv 2102.09672, section 3.2)."""
COLUMNS = ("x0_x", "x0_prediction", "next_x", "next_x0", "next_previous")


@dataclass(frozen=True)
class Schedule:
    """The steps of one scheduler with one number of steps."""

    timesteps: Tensor
    """Timesteps (S,) as the network is given them."""
    coefficients: Tensor
    """Coefficients (S, 5), float32, in the order of COLUMNS."""
    initial_scale: float
    """Factor of unit noise before the first step."""

    def __len__(self) -> int:
        return len(self.timesteps)


def step(
    x: Tensor, prediction: Tensor, previous: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Step N images, each with its own scheduler: returns (next x, x0).

    x, prediction, previous: (N, C, H, W), the last being x0 of the step before, anything finite
    at the first one; coefficients: (N, 5).
    """
    columns = coefficients[:, :, None, None, None].unbind(1)
    x0_x, x0_prediction, next_x, next_x0, next_previous = columns
    x0 = x0_x * x + x0_prediction * prediction
    return next_x * x + next_x0 * x0 + next_previous * previous, x0


@lru_cache(maxsize=256)
def schedule(config: DiffusionConfig, scheduler: Scheduler, num_inference_steps: int) -> Schedule:
    """The table of one scheduler. Raises ValueError when there is none of that name."""
    if scheduler not in [*Scheduler]:
        raise ValueError(f"unknown scheduler {scheduler!r}; choose one of {', '.join(Scheduler)}")
    timesteps = _timesteps(config, num_inference_steps)
    kept = _alphas_cumprod(config)
    if scheduler == Scheduler.DDIM:
        noise = (1 / kept.double() - 1).sqrt()
        following = timesteps - config.num_train_timesteps // num_inference_steps
        next_ratio = torch.where(following >= 0, noise[following.clamp(min=0)], 0)
    else:  # rounded as diffusers does it
        noise = (((1 - kept) / kept) ** 0.5).double()
        next_ratio = torch.cat([noise[timesteps[1:]], noise.new_zeros(1)])
    ratio = noise[timesteps]
    alpha, next_alpha = (ratio**2 + 1) ** -0.5, (next_ratio**2 + 1) ** -0.5
    sigma, next_sigma = ratio * alpha, next_ratio * next_alpha
    if config.prediction_type == "v_prediction":
        x0_x, x0_prediction = alpha, -sigma
    else:
        x0_x, x0_prediction = 1 / alpha, -ratio
    next_x = next_sigma / sigma
    next_x0 = next_alpha - next_x * alpha
    next_previous = torch.zeros_like(next_x0)
    if scheduler == Scheduler.DPMSOLVER:
        h = ratio.log() - next_ratio.log()  # of half the log-SNR; infinite at the end
        for i in range(1, len(h) - 1):  # the first step and the last are of first order
            extrapolated = next_x0[i] * h[i] / h[i - 1] / 2
            next_x0[i] += extrapolated
            next_previous[i] -= extrapolated
    columns = (x0_x, x0_prediction, next_x, next_x0, next_previous)
    # Euler begins with the largest sigma, and keeps x / alpha
    scale = float(ratio[0]) * float(alpha[0]) if scheduler == Scheduler.EULER else 1.0
    given = timesteps.float() if scheduler == Scheduler.EULER else timesteps
    return Schedule(given, torch.stack(columns, dim=1).float(), scale)


def _timesteps(config: DiffusionConfig, count: int) -> Tensor:
    """Trailing timesteps (arXiv 2305.08891, table 2), descending, (S,) int64.

    For some counts (61 of 1000 is one) the `arange` over floats gives one too many, -1.
    """
    n = config.num_train_timesteps
    return torch.from_numpy(np.arange(n, 0, -n / count).round().astype(np.int64) - 1)[:count]


@lru_cache(maxsize=8)
def _alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """Share of the image's variance that is left at each timestep of training, (T,) float32."""
    n, first, last = config.num_train_timesteps, *BETAS
    match config.beta_schedule:
        case "linear":
            betas = torch.linspace(first, last, n)
        case "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, n) ** 2
        case "squaredcos_cap_v2":
            left = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
            steps = zip(left[1:], left[:-1], strict=True)
            betas = torch.tensor([min(1 - after / before, MOST_BETA) for after, before in steps])
    return (1 - betas).cumprod(0)
