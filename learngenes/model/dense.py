"""A DiT whose layers own their weights: what a model becomes when it is trained beyond FINE."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from learngenes.config import Kind
from learngenes.model.dit import Stem
from learngenes.model.factors import Layer, Learngenes, Scales, materialise

Weights = Mapping[Kind, tuple[Tensor, Tensor]]
"""One layer's W (m, n) and bias (m,) of each kind."""


class DenseDiT(nn.Module):
    """A DiT that is trainable in every part; numerically `DiT` in materialised mode."""

    def __init__(self, stem: Stem, layers: Sequence[Weights]) -> None:
        super().__init__()
        self.config = stem.config
        self.stem = stem
        self.layers = nn.ModuleList(_own(layer) for layer in layers)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """x: (N, C, H, W); timesteps, class_labels: (N,) -> prediction (N, C, H, W)."""
        prediction: Tensor = self.stem(
            x, timesteps, class_labels, cast(Sequence[Layer], self.layers)
        )
        return prediction

    def weights(self) -> list[Weights]:
        return [
            {kind: (layer[kind].weight.detach(), layer[kind].bias.detach()) for kind in Kind}
            for layer in cast(Sequence[Mapping[Kind, nn.Linear]], self.layers)
        ]


@torch.no_grad()
def materialised(genes: Learngenes, scales: Scales) -> list[Weights]:
    """Every W of the model that `scales` makes of `genes`, layer by layer."""
    u, v = ({kind: side[kind][:, : scales.rank] for kind in Kind} for side in (genes.u, genes.v))
    return [
        {k: (materialise(u[k], layer.sigma[k], v[k]), layer.bias[k]) for k in Kind}
        for layer in scales.layers()
    ]


def _own(weights: Weights) -> nn.ModuleDict:
    layer: dict[str, nn.Module] = {}
    for kind, (weight, bias) in weights.items():
        layer[kind] = nn.Linear(weight.shape[1], weight.shape[0])
        layer[kind].load_state_dict({"weight": weight, "bias": bias})
    return nn.ModuleDict(layer)
