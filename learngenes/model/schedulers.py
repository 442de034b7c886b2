"""Noise schedulers for sampling: diffusers' own, set to their timesteps.

`learngenes.stepping.schedules` makes tables of them, by which rows of different ones are stepped.
"""

from typing import TYPE_CHECKING, TypeAlias

import torch

from learngenes.config import DiffusionConfig, Scheduler
from learngenes.lazily import from_diffusers

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    DiffusersScheduler: TypeAlias = (
        DDIMScheduler | DPMSolverMultistepScheduler | EulerDiscreteScheduler
    )

SOLVERS = {
    Scheduler.DPMSOLVER: "DPMSolverMultistepScheduler",
    Scheduler.EULER: "EulerDiscreteScheduler",
}


def diffusers_scheduler(
    config: DiffusionConfig, scheduler: Scheduler, num_inference_steps: int
) -> "DiffusersScheduler":
    """A scheduler of diffusers, set to its timesteps; it keeps state, so each batch needs its own.

    DDIM must not clip the predicted image: diffusers keeps the noise of the unclipped one, and
    under guidance the two drift apart. Trailing spacing is an `arange` over floats, which for
    some numbers of steps (61 of 1000 is one) gives one timestep too many, -1; it is dropped.
    """
    if scheduler not in [*Scheduler]:
        raise ValueError(f"unknown scheduler {scheduler!r}; choose one of {', '.join(Scheduler)}")
    n = num_inference_steps
    if scheduler == Scheduler.DDIM:
        ddim: DDIMScheduler = from_diffusers("DDIMScheduler")(
            **config.model_dump(), timestep_spacing="trailing", clip_sample=False
        )
        ddim.set_timesteps(n)
        ddim.timesteps = ddim.timesteps[:n]
        return ddim
    solver = from_diffusers(SOLVERS[scheduler])(**config.model_dump(), timestep_spacing="trailing")
    solver.set_timesteps(n)
    solver.sigmas = torch.cat([solver.sigmas[:n], solver.sigmas[-1:]])
    solver.timesteps = solver.timesteps[:n]
    return solver
