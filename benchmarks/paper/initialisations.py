"""Sigma that the paper's ablation begins with beside FINE's, which is `interpolated`."""

import torch
from torch import Tensor

from learngenes.config import Kind, NetworkConfig, Size
from learngenes.model.factors import Scales


def identical(scales: Scales, size: Size) -> Scales:
    """Every layer starts as the mean layer of `scales`."""

    def repeated(rows: Tensor) -> Tensor:
        return rows.mean(0).repeat(size.depth, 1)

    with torch.no_grad():
        return Scales(
            {kind: repeated(scales.sigma[kind][:, : size.rank]) for kind in Kind},
            {kind: repeated(scales.bias[kind]) for kind in Kind},
        )


def random(config: NetworkConfig, size: Size, generator: torch.Generator) -> Scales:
    """Standard normal Sigma, zero biases."""
    sigma = {kind: torch.randn(size.depth, size.rank, generator=generator) for kind in Kind}
    bias = {kind: torch.zeros(size.depth, kind.shape(config.width)[0]) for kind in Kind}
    return Scales(sigma, bias)
