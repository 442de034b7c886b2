"""Frozen layers in each mode and dtype, of which a model that is served alone is made."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngenes.config import DType, Kind, Mode, executable
from learngenes.device import trim_memory
from learngenes.model.factors import DenseLayers, Learngenes, Own, materialise
from learngenes.model.rounded import Rounded

Stored = Tensor | Rounded
"""A matrix as a model of some dtype keeps it."""


def factored_linear(x: Tensor, u: Stored, sigma: Tensor, vt: Stored, bias: Tensor) -> Tensor:
    """((x V) * sigma) U^T + b without forming W; x: (..., n), vt = V^T: (r, n) -> (..., m)."""
    return F.linear(F.linear(x, unpacked(vt, x.dtype)).mul_(sigma), unpacked(u, x.dtype), bias)


def unpacked(matrix: Stored, dtype: torch.dtype) -> Tensor:
    """A stored matrix as it is multiplied with; the same memory where it is in `dtype`."""
    return matrix.unpacked(dtype) if isinstance(matrix, Rounded) else matrix.to(dtype)


def _held(matrix: Stored) -> nn.Parameter | Rounded:
    if isinstance(matrix, Rounded):
        return matrix
    return nn.Parameter(matrix, requires_grad=False)


class FactoredLinear(nn.Module):
    """A linear layer in `factored` mode; u (m, r), vt (r, n) belong to every layer of a kind."""

    def __init__(self, u: Stored, sigma: Tensor, vt: Stored, bias: Tensor) -> None:
        super().__init__()
        self.u, self.vt = _held(u), _held(vt)
        self.sigma, self.bias = (nn.Parameter(t, requires_grad=False) for t in (sigma, bias))

    def forward(self, x: Tensor) -> Tensor:
        return factored_linear(x, self.u, self.sigma, self.vt, self.bias)

    def written(self) -> Tensor:
        """W (m, n) that the product amounts to."""
        u, vt = (unpacked(factor, torch.float32) for factor in (self.u, self.vt))
        return materialise(u, self.sigma, vt.T)


class MaterialisedLinear(nn.Module):
    """A linear layer in `materialised` mode: W (m, n) kept dense."""

    def __init__(self, weight: Stored, bias: Tensor) -> None:
        super().__init__()
        self.weight = _held(weight)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, unpacked(self.weight, x.dtype), self.bias)

    def written(self) -> Tensor:
        """W (m, n) that is multiplied with."""
        return unpacked(self.weight, torch.float32)


@torch.no_grad()
def serving_layers(
    genes: Learngenes, own: Own, mode: Mode, dtype: DType, compute: torch.dtype
) -> Iterator[nn.ModuleDict]:
    """Frozen layers in `mode`, sharing one copy of the U, V prefix when factored.

    Matrices are stored in `dtype`, Sigma and biases in `compute`. Raises ValueError for W in
    int3, and where `own` cannot be executed in that mode.
    """
    if not executable(mode, dtype):
        raise ValueError("int3 is for factored models: W is never stored in it")
    if isinstance(own, DenseLayers):
        if mode is Mode.FACTORED:
            raise ValueError("a refined model has no factors: its mode is materialised")
        yield from _dense_layers(own, dtype, compute)
        return
    if mode is Mode.DENSE:
        raise ValueError("mode dense is for models of imported layers: these share U and V")
    u, v = ({kind: side[kind][:, : own.rank] for kind in Kind} for side in (genes.u, genes.v))
    if mode is Mode.FACTORED:
        stored_u = {kind: stored(u[kind], dtype) for kind in Kind}
        stored_vt = {kind: stored(v[kind].T, dtype) for kind in Kind}
    for layer in own.layers():
        modules: dict[str, nn.Module] = {}
        for kind in Kind:
            sigma, bias = (t.detach().to(compute) for t in (layer.sigma[kind], layer.bias[kind]))
            if mode is Mode.FACTORED:
                modules[kind] = FactoredLinear(stored_u[kind], sigma, stored_vt[kind], bias)
            else:
                weight = materialise(u[kind], layer.sigma[kind], v[kind])
                modules[kind] = MaterialisedLinear(stored(weight, dtype), bias)
        trim_memory(u[Kind.QKV].device)  # else the holes between kept matrices stay
        yield nn.ModuleDict(modules)


def _dense_layers(own: DenseLayers, dtype: DType, compute: torch.dtype) -> Iterator[nn.ModuleDict]:
    for index in range(own.depth):
        yield nn.ModuleDict(
            {
                kind: MaterialisedLinear(
                    stored(own.weight[kind][index], dtype),
                    own.bias[kind][index].to(compute),
                )
                for kind in Kind
            }
        )


def as_served(genes: Learngenes, own: Own, mode: Mode, dtype: DType) -> Own:
    """What computes in float32 what `own` does in few bits; `own` itself where there are none."""
    if dtype.bits is None:
        return own
    layers = [
        cast(Mapping[Kind, FactoredLinear | MaterialisedLinear], layer)
        for layer in serving_layers(genes, own, mode, dtype, torch.float32)
    ]
    weights = [
        {kind: (layer[kind].written(), layer[kind].bias) for kind in Kind} for layer in layers
    ]
    return DenseLayers.of(weights, own.classes)


def stored(matrix: Tensor, dtype: DType) -> Stored:
    """A matrix as a model of `dtype` keeps it."""
    if dtype.bits is not None:
        return Rounded(matrix, dtype.bits)
    return matrix.to(torch.bfloat16 if dtype is DType.BFLOAT16 else torch.float32).contiguous()
