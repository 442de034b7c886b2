"""Where a new model's Sigma comes from (FINE, section 3.3 and its ablation of initialisations)."""

import torch
from torch import Tensor

from learngenes.config import Kind, NetworkConfig, Size
from learngenes.model.factors import LayerScales, Scales


def reference_scales(config: NetworkConfig) -> Scales:
    """Sigma that phase 1 starts from: near one, and zero for adaLN (adaLN-Zero)."""

    def start(kind: Kind) -> Tensor:
        if kind is Kind.ADALN:
            return torch.zeros(config.depth, config.rank)
        return 1 + 0.1 * torch.randn(config.depth, config.rank)

    no_bias = {kind: torch.zeros(config.depth, kind.shape(config.width)[0]) for kind in Kind}
    return Scales({kind: start(kind) for kind in Kind}, no_bias)


def interpolated_layers(scales: Scales, size: Size) -> list[LayerScales]:
    """Layer l of depth L reads `scales` at relative depth l / (L - 1), linearly between layers.

    Differentiable. Raises ValueError when the rank is larger than that of `scales`.
    """
    if size.rank > scales.rank:
        raise ValueError(f"rank {size.rank} is more than the {scales.rank} that Sigma has")
    source, depth = scales.layers(), size.depth
    last = len(source) - 1
    positions = [i * last / (depth - 1) for i in range(depth)] if depth > 1 else [last / 2]
    return [_between(source, position, size.rank) for position in positions]


def _between(source: list[LayerScales], position: float, rank: int) -> LayerScales:
    low = min(int(position), len(source) - 1)
    high = min(low + 1, len(source) - 1)
    t = position - low

    def mix(a: Tensor, b: Tensor) -> Tensor:
        return a if t == 0 else torch.lerp(a, b, t)

    a, b = source[low], source[high]
    return LayerScales(
        {kind: mix(a.sigma[kind][:rank], b.sigma[kind][:rank]) for kind in Kind},
        {kind: mix(a.bias[kind], b.bias[kind]) for kind in Kind},
    )


def interpolated(scales: Scales, size: Size) -> Scales:
    """The `linear` initialisation; from another model's Scales it is `from a given model`."""
    layers = interpolated_layers(scales, size)
    with torch.no_grad():
        return Scales(
            {kind: torch.stack([layer.sigma[kind] for layer in layers]) for kind in Kind},
            {kind: torch.stack([layer.bias[kind] for layer in layers]) for kind in Kind},
            scales.classes,
        )
