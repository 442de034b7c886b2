import itertools

import pytest
import torch
from torch import Tensor

from learngenes.config import DiffusionConfig, Scheduler
from learngenes.model.schedulers import diffusers_scheduler
from learngenes.stepping.schedules import Schedule, schedule, step

SHAPE = (1, 4, 4)


def trajectory(table: Schedule, noise: Tensor, predictions: Tensor) -> list[Tensor]:
    """x after every step, of one image."""
    x, previous = noise[None] * table.initial_scale, torch.zeros(1, *SHAPE)
    states = []
    for i, prediction in enumerate(predictions):
        x, previous = step(x, prediction[None], previous, table.coefficients[i : i + 1])
        states.append(x[0])
    return states


def reference(
    config: DiffusionConfig, name: str, noise: Tensor, predictions: Tensor
) -> list[Tensor]:
    """The same by diffusers; what its Euler keeps is divided by the signal's scale."""
    steps = diffusers_scheduler(config, name, len(predictions))
    x = noise * steps.init_noise_sigma
    states = []
    for i, (t, prediction) in enumerate(zip(steps.timesteps, predictions, strict=True)):
        steps.scale_model_input(x, t)
        x = steps.step(prediction, t, x).prev_sample
        scale = (steps.sigmas[i + 1] ** 2 + 1) ** 0.5 if name == "euler" else 1.0
        states.append(x / scale)
    return states


def worst_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of all steps; as a share of the largest value where random predictions blow x up."""
    return max(
        ((a - b).abs().max() / max(1.0, b.abs().max())).item()
        for a, b in zip(ours, theirs, strict=True)
    )


COSINE = DiffusionConfig()
LINEAR = [
    DiffusionConfig(prediction_type=prediction_type, beta_schedule="scaled_linear")
    for prediction_type in ("v_prediction", "epsilon")
]


@pytest.mark.parametrize("name", Scheduler)
@pytest.mark.parametrize(
    ("config", "count"),
    [(COSINE, 40), *itertools.product(LINEAR, (1, 2, 3, 10, 25, 61, 250))],
)
def test_every_step_is_that_of_diffusers(name: str, config: DiffusionConfig, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(SHAPE, generator=generator)
    predictions = torch.randn((count, *SHAPE), generator=generator)
    table = schedule(config, name, count)
    assert torch.equal(table.timesteps, diffusers_scheduler(config, name, count).timesteps)
    ours = trajectory(table, noise, predictions)
    theirs = reference(config, name, noise, predictions)
    assert worst_difference(ours, theirs) <= 1e-4


def test_images_of_one_call_have_schedulers_and_steps_of_their_own() -> None:
    config = DiffusionConfig()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((3, *SHAPE), generator=generator)
    predictions = torch.randn((20, 3, *SHAPE), generator=generator)
    tables = [schedule(config, name, 20) for name in Scheduler]
    alone = [trajectory(t, noise[i], predictions[:, i]) for i, t in enumerate(tables)]
    scales = torch.tensor([t.initial_scale for t in tables])[:, None, None, None]
    x, previous = noise * scales, torch.zeros(3, *SHAPE)
    for i in range(20):
        coefficients = torch.stack([t.coefficients[i] for t in tables])
        x, previous = step(x, predictions[i], previous, coefficients)
        assert all(torch.equal(x[k], alone[k][i]) for k in range(3))


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"choose one of ddim, dpmsolver\+\+, euler"):
        schedule(DiffusionConfig(), "heun", 5)
