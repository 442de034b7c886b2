import torch

from benchmarks.paper.initialisations import identical, random
from learngenes.config import NetworkConfig, Size
from learngenes.model.factors import Scales


def test_identical_repeats_the_mean_layer(scales: Scales) -> None:
    stacked = identical(scales, Size(depth=3, rank=24)).stacked()
    mean = scales.stacked()["sigma.in"].mean(0)[:24]
    for layer in stacked["sigma.in"]:
        torch.testing.assert_close(layer, mean)


def test_random_depends_on_its_generator_alone(network: NetworkConfig) -> None:
    size = Size(depth=3, rank=24)
    first, again = (
        random(network, size, torch.Generator().manual_seed(5)).stacked() for _ in range(2)
    )
    assert first["sigma.adaLN"].shape == (3, 24)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["sigma.qkv"].std() > 0.5
