import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from learngenes.config import DiffusionConfig, Mode, Scheduler, Size
from learngenes.family.family import Family, load_family
from learngenes.model.dit import DiT
from learngenes.model.sampling import initial_noise, sample
from learngenes.model.schedulers import diffusers_scheduler


@pytest.fixture
def model(family: Family) -> DiT:
    return family.assemble(family.scales, Mode.MATERIALISED)


def sampled(model: DiT, labels: list[int], seeds: list[int], **how: Any) -> torch.Tensor:
    return sample(model, DiffusionConfig(), labels, seeds, **how)


@pytest.mark.parametrize("scheduler", Scheduler)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_depends_on_its_own_seed_only(
    model: DiT, scheduler: Scheduler, guidance_scale: float
) -> None:
    how = {"num_inference_steps": 5, "guidance_scale": guidance_scale, "scheduler": scheduler}
    images = functools.partial(sampled, model, **how)
    batch = images([0, 1, 2, 3], [7, 8, 9, 10])
    alone = images([2], [9])
    assert batch.shape == (4, 3, 8, 8)
    assert batch.dtype == torch.uint8
    assert (batch[2].int() - alone[0].int()).abs().max() <= 2
    assert torch.equal(batch, images([0, 1, 2, 3], [7, 8, 9, 10]))
    assert not torch.equal(alone, images([2], [11]))
    assert not torch.equal(alone, images([3], [9]))


def test_guidance_of_one_is_unguided(model: DiT) -> None:
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for guidance_scale in (1.0, 1.5):
        sampled(model, [0], [0], num_inference_steps=2, guidance_scale=guidance_scale)
    assert rows == [1, 1, 2, 2]


def test_every_step_is_told_and_can_stop_the_sampling(model: DiT) -> None:
    told: list[tuple[int, int]] = []

    def on_step(done: int, steps: int) -> None:
        told.append((done, steps))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(model, [0], [0], num_inference_steps=4, on_step=on_step)
    assert told == [(1, 4), (2, 4)]


@pytest.mark.parametrize("scheduler", Scheduler)
def test_every_number_of_steps_gives_as_many_timesteps(scheduler: Scheduler) -> None:
    for n in range(1, 251):
        timesteps = diffusers_scheduler(DiffusionConfig(), scheduler, n).timesteps
        assert len(timesteps) == n
        assert timesteps.min() >= 0


@pytest.mark.parametrize("scheduler", Scheduler)
def test_one_step_more_changes_a_trained_models_image_little(scheduler: Scheduler) -> None:
    family = load_family(Path("families/fashion"))
    model = family.assemble(family.scales_of(Size(depth=3, rank=256)), Mode.MATERIALISED)
    assert family.manifest.diffusion == DiffusionConfig()
    sixty, sixty_one = (
        sampled(model, [7], [0], num_inference_steps=n, scheduler=scheduler).float()
        for n in (60, 61)
    )
    assert (sixty - sixty_one).abs().mean() < 5


def test_every_bit_of_a_seed_counts(family: Family) -> None:
    network = family.manifest.network
    seeds = [1, 1 + 2**32, 1 + 2**40, 2**53 + 1, 2**62 + 1, 2**33 + 2, 2**32 + 2]
    noises = initial_noise(network, seeds)
    for one, other in itertools.combinations(range(len(seeds)), 2):
        assert (noises[one] - noises[other]).abs().mean() > 0.2, (seeds[one], seeds[other])
    many = initial_noise(network, range(2**40, 2**40 + 500))
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02
    assert torch.equal(noises[0], initial_noise(network, [1])[0])
