"""Small networks with random weights: nothing here needs a trained family."""

import pytest
import torch

from learngenes.config import Kind, NetworkConfig
from learngenes.dit import Stem
from learngenes.factors import Learngenes, Scales
from learngenes.sigma import reference_scales


@pytest.fixture
def network() -> NetworkConfig:
    return NetworkConfig(
        sample_size=8,
        in_channels=3,
        patch_size=2,
        width=32,
        num_attention_heads=4,
        num_classes=5,
        depth=4,
        rank=48,
    )


@pytest.fixture
def genes(network: NetworkConfig) -> Learngenes:
    torch.manual_seed(1)
    return Learngenes(network)


@pytest.fixture
def stem(network: NetworkConfig) -> Stem:
    """Nothing is zero, so that every part of the network shows in its output."""
    torch.manual_seed(2)
    stem = Stem(network)
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return stem


@pytest.fixture
def scales(network: NetworkConfig) -> Scales:
    torch.manual_seed(3)
    scales = reference_scales(network)
    for kind in Kind:
        for layer in scales.layers():
            torch.nn.init.normal_(layer.sigma[kind])
            torch.nn.init.normal_(layer.bias[kind], std=0.2)
    return scales
