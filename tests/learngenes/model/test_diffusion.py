import pytest
import torch

from learngenes.config import DiffusionConfig
from learngenes.model.diffusion import heldout_loss, noise_process, step_generator, training_batch


def test_the_timesteps_of_a_batch_are_evenly_spread() -> None:
    process = noise_process(DiffusionConfig())
    images = torch.zeros(20, 1, 4, 4)
    seen = []
    for seed in range(3):
        _, timesteps, _ = training_batch(process, images, torch.Generator().manual_seed(seed))
        assert sorted((timesteps // 50).tolist()) == list(range(20))
        assert timesteps.tolist() != sorted(timesteps.tolist())
        seen.append(timesteps.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_streams_of_steps_draw_apart_and_a_step_draws_the_same_again() -> None:
    drawn = {
        (stream, step): tuple(torch.rand(4, generator=step_generator(stream, step)).tolist())
        for stream in (0, 1, 2, 1000, 5001)
        for step in range(5)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert tuple(torch.rand(4, generator=step_generator(2, 3)).tolist()) == drawn[2, 3]


def test_heldout_loss_is_that_of_fixed_noise() -> None:
    process = noise_process(DiffusionConfig())
    images = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(300, dtype=torch.long)
    losses = [
        heldout_loss(lambda x, _t, _y: torch.zeros_like(x), process, images, labels, size)
        for size in (7, 300)
    ]
    assert losses[0] == pytest.approx(losses[1])
    assert 0.9 < losses[0] < 1.1  # velocity of unit noise and unit images has unit variance
