"""diffusers' schedulers as tables, so that one tensor operation steps rows of different ones.

Each of them is linear in what it holds. With x the noisy image, scaled as under a
variance-preserving process, and x0 what a prediction says of the clean one:

    x0   = x0_x * x + x0_prediction * prediction
    next = next_x * x + next_x0 * x0 + next_previous * (x0 of the step before)

DDIM (arXiv 2010.02502, eta 0) and Euler (arXiv 2206.00364, algorithm 2 without churn) are the
same step between other noise levels; DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) also
looks one step back.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from learngenes.config import DiffusionConfig, Scheduler
from learngenes.model.schedulers import diffusers_scheduler

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

    from learngenes.model.schedulers import DiffusersScheduler

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
    steps = diffusers_scheduler(config, scheduler, num_inference_steps)
    ratio, next_ratio = (
        _of_ddim(cast("DDIMScheduler", steps)) if scheduler == Scheduler.DDIM else _of_solver(steps)
    )
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
    scale = float(steps.init_noise_sigma)
    if scheduler == Scheduler.EULER:  # which keeps x / alpha
        scale *= float(alpha[0])
    return Schedule(steps.timesteps, torch.stack(columns, dim=1).float(), scale)


def _of_solver(steps: "DiffusersScheduler") -> tuple[Tensor, Tensor]:
    """Ratios sigma / alpha before and after each step, (S,) float64 each."""
    ratio = steps.sigmas.double()
    return ratio[:-1], ratio[1:]


def _of_ddim(steps: "DDIMScheduler") -> tuple[Tensor, Tensor]:
    """The same of DDIM, which keeps its noise levels in other words."""
    following = steps.timesteps - steps.config["num_train_timesteps"] // steps.num_inference_steps
    cumulative = steps.alphas_cumprod.double()
    final = steps.final_alpha_cumprod.double()
    after = torch.where(following >= 0, cumulative[following.clamp(min=0)], final)
    before = cumulative[steps.timesteps]
    return (1 / before - 1).sqrt(), (1 / after - 1).sqrt()
