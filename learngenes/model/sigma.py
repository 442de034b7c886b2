"""Where a new model's Sigma comes from (FINE, section 3.3 and its ablation of initialisations)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learngenes.config import Kind, NetworkConfig, Size
from learngenes.model.factors import Scales


def reference_scales(config: NetworkConfig) -> Scales:
    """Sigma that phase 1 starts from: near one, and zero for adaLN (adaLN-Zero)."""

    def start(kind: Kind) -> Tensor:
        if kind is Kind.ADALN:
            return torch.zeros(config.depth, config.rank)
        return 1 + 0.1 * torch.randn(config.depth, config.rank)

    no_bias = {kind: torch.zeros(config.depth, kind.shape(config.width)[0]) for kind in Kind}
    return Scales({kind: start(kind) for kind in Kind}, no_bias)


def remaining(order: Sequence[int], depth: int) -> tuple[int, ...]:
    """The layers, ascending, that a model of `depth` keeps when they leave in `order`."""
    return tuple(sorted(order[len(order) - depth :]))


def subset(scales: Scales, layers: Sequence[int], rank: int | None = None) -> Scales:
    """Sigma and biases of some layers, at a rank prefix. Raises ValueError for a larger rank."""
    if rank is not None and rank > scales.rank:
        raise ValueError(f"rank {rank} is more than the {scales.rank} that Sigma has")
    kept = torch.tensor(layers)
    return Scales(
        {kind: scales.sigma[kind][kept, :rank] for kind in Kind},
        {kind: scales.bias[kind][kept] for kind in Kind},
        scales.classes,
    )


def interpolated(scales: Scales, size: Size) -> Scales:
    """The `linear` initialisation: layer l of depth L reads `scales` at relative depth l / (L - 1).

    Linear between layers. Raises ValueError when the rank is larger than that of `scales`.
    """
    if size.rank > scales.rank:
        raise ValueError(f"rank {size.rank} is more than the {scales.rank} that Sigma has")
    last, depth = scales.depth - 1, size.depth
    positions = [i * last / (depth - 1) for i in range(depth)] if depth > 1 else [last / 2]

    def between(rows: Tensor, position: float) -> Tensor:
        low = min(int(position), last)
        share = position - low
        return rows[low] if share == 0 else torch.lerp(rows[low], rows[low + 1], share)

    def mixed(rows: Tensor) -> Tensor:
        return torch.stack([between(rows, position) for position in positions])

    with torch.no_grad():
        return Scales(
            {kind: mixed(scales.sigma[kind][:, : size.rank]) for kind in Kind},
            {kind: mixed(scales.bias[kind]) for kind in Kind},
            scales.classes,
        )
