"""The network in training: the W of all layers written out at once, and blocks that compile.

W is a product of U diag(sigma), of every layer one below the other, with V^T: one product for each
kind, forward and backward. N images, T tokens, D width, L layers.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngenes.config import Kind, NetworkConfig
from learngenes.model.dit import Stem, block
from learngenes.model.factors import Layer, Learngenes, Scales
from learngenes.model.rounded import straight_through
from learngenes.model.sigma import reference_scales, remaining, subset
from learngenes.stepping.arithmetic import BLOCK_KINDS

log = structlog.get_logger()

MOST_COMPILED = 32
"""Most compilations of one function: W is written for some numbers of layers."""


def written(u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """W of every layer, (L, m, n), of U (m, r), V (n, r) and sigma (L, r)."""
    stacked = (u * sigma[:, None]).flatten(0, 1) @ v.T  # (L m, n)
    weights: Tensor = stacked.unflatten(0, (len(sigma), -1))
    return weights


def trained_block(
    x: Tensor,
    modulation: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    heads: int,
) -> Tensor:
    """One block; x: (N, T, D); modulation: (N, 6D); W (m, n) and bias (m,) of BLOCK_KINDS."""
    layer: Layer = {
        kind: functools.partial(F.linear, weight=weight, bias=bias)
        for kind, weight, bias in zip(BLOCK_KINDS, weights, biases, strict=True)
    }
    return block(x, modulation, layer, heads)


@dataclass(frozen=True)
class Parts:
    """What a network in training is made of, as it is or compiled."""

    written: Callable[..., Tensor] = written
    block: Callable[..., Tensor] = trained_block


PLAIN = Parts()


def compiled_parts() -> Parts:
    """Parts through torch.compile, at their first call; as they are where that fails."""
    return Parts(_compiled(written), _compiled(trained_block))


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    how: dict[str, Any] = {"fullgraph": True, "recompile_limit": MOST_COMPILED}
    compiled: Callable[..., Tensor] | None = torch.compile(function, **how)

    def run(*arguments: Any) -> Tensor:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(*arguments)
            except Exception as error:  # no compiler on this machine, most likely
                log.warning("training uncompiled, which is slower", reason=str(error)[-300:])
                compiled = None
        return function(*arguments)

    return run


def predict(
    stem: Stem,
    genes: Learngenes,
    scales: Scales,
    noisy: tuple[Tensor, Tensor, Tensor],
    parts: Parts = PLAIN,
    weight_bits: int | None = None,
) -> Tensor:
    """Prediction (N, C, H, W) for images (N, C, H, W), timesteps and class labels (N,).

    Differentiable in all parameters; at the rank of `scales`; with every W rounded to
    `weight_bits`, if there are any.
    """
    h, conditioning = stem.embed(*noisy)
    factors = {k: (genes.u[k][:, : scales.rank], genes.v[k][:, : scales.rank]) for k in Kind}

    def weights(kind: Kind) -> Tensor:
        u, v = factors[kind]
        exact = parts.written(u, scales.sigma[kind], v)
        return exact if weight_bits is None else straight_through(exact, weight_bits)

    if weight_bits is None:  # factor by factor: there are few rows
        u, v = factors[Kind.ADALN]
        reduced = F.linear(conditioning, v.T) * scales.sigma[Kind.ADALN][:, None]  # (L, N, r)
        modulations = F.linear(reduced, u)
    else:
        modulations = conditioning @ weights(Kind.ADALN).mT
    modulations = modulations + scales.bias[Kind.ADALN][:, None]  # (L, N, 6D)
    layers = zip(*(weights(kind).unbind(0) for kind in BLOCK_KINDS), strict=True)
    biases = zip(*(scales.bias[kind].unbind(0) for kind in BLOCK_KINDS), strict=True)
    for own in zip(modulations.unbind(0), layers, biases, strict=True):
        h = parts.block(h, *own, stem.config.num_attention_heads)
    return stem.finish(h, conditioning)


def greedy_order(
    depth: int, loss: Callable[[Sequence[int]], float], *, spread: bool = False
) -> tuple[int, ...]:
    """Layers in the order in which they leave: the next is the one whose absence costs least.

    `loss` is that of a model of the layers that it is given. As pruning by depth looks for what can
    go (BK-SDM, arXiv 2305.15798). With `spread` the first and the last stay, and what stays is
    never further apart than it would be if it were spread evenly: such models cost more at first,
    and learn more when every W is trained.
    """
    kept, left = list(range(depth)), []
    while len(kept) > 1:

        def without(layer: int) -> list[int]:
            return [other for other in kept if other != layer]

        may = [layer for layer in kept if not spread or _spread(without(layer), depth)]
        least = min(may or kept, key=lambda layer: loss(without(layer)))
        kept.remove(least)
        left.append(least)
    return (*left, *kept)


def _spread(kept: Sequence[int], depth: int) -> bool:
    if len(kept) < 2:
        return True
    widest = max(after - before for before, after in itertools.pairwise(kept))
    even = math.ceil((depth - 1) / (len(kept) - 1))
    return (kept[0], kept[-1]) == (0, depth - 1) and widest <= even


class FactorisedDiT(nn.Module):
    """Network of phase 1: a stem, U and V, and for each depth a Sigma of its own.

    Smaller depths begin once it is known in which order layers leave (`begin_depths`).
    """

    order: Tensor
    """Layers in the order in which they leave, (L,), the last of all last; -1 before."""

    def __init__(self, config: NetworkConfig, depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = Stem(config)
        self.genes = Learngenes(config)
        full = reference_scales(config)
        self.depths = nn.ModuleDict(
            {str(depth): subset(full, range(depth)) for depth in depths if depth < config.depth}
        )
        self.depths[str(config.depth)] = full
        self.register_buffer("order", torch.full((config.depth,), -1))
        self.parts = PLAIN

    @property
    def scales(self) -> Scales:
        """Sigma of the full size."""
        return self.scales_of(self.stem.config.depth)

    def scales_of(self, depth: int) -> Scales:
        scales = self.depths[str(depth)]
        assert isinstance(scales, Scales)
        return scales

    @property
    def layer_order(self) -> tuple[int, ...]:
        """Layers in the order in which they leave; none before it is known."""
        order: list[int] = self.order.tolist()
        return tuple(order) if order[0] >= 0 else ()

    @property
    def trained_depths(self) -> dict[int, Scales]:
        """Sigma of each depth that is trained by now, the smallest first."""
        full = self.stem.config.depth
        depths = sorted(map(int, self.depths)) if self.layer_order else [full]
        return {depth: self.scales_of(depth) for depth in depths}

    @torch.no_grad()
    def begin_depths(self, order: Sequence[int]) -> None:
        """Let every smaller depth begin with the full size's Sigma, of the layers that it keeps."""
        self.order.copy_(torch.tensor(order))
        for depth, scales in self.depths.items():
            if int(depth) < len(order):
                begun = subset(self.scales, remaining(order, int(depth)))
                scales.load_state_dict(begun.state_dict())

    @torch.no_grad()
    def order_components(self) -> None:
        """Put the components u sigma v^T in order of length: a rank prefix has the longest."""
        for kind in Kind:
            u, v = self.genes.u[kind], self.genes.v[kind]
            lengths = self.scales.sigma[kind].norm(dim=0) * u.norm(dim=0) * v.norm(dim=0)
            order = lengths.argsort(descending=True)
            owns = [self.scales_of(int(depth)).sigma[kind] for depth in self.depths]
            for component in (u, v, *owns):
                component.copy_(component[:, order])

    def forward(
        self, x: Tensor, timesteps: Tensor, class_labels: Tensor, depth: int | None = None
    ) -> Tensor:
        """Prediction (N, C, H, W) of the network at a depth, the full one by default."""
        scales = self.scales if depth is None else self.scales_of(depth)
        parts = self.parts if torch.is_grad_enabled() else PLAIN
        return predict(self.stem, self.genes, scales, (x, timesteps, class_labels), parts)
