"""Frozen layers in each mode and dtype, of which a model that is served alone is made."""

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngenes.config import DType, Kind, Mode, executable
from learngenes.device import release_memory
from learngenes.model.factors import DenseLayers, Learngenes, Own, materialise


def factored_linear(x: Tensor, u: Tensor, sigma: Tensor, vt: Tensor, bias: Tensor) -> Tensor:
    """((x V) * sigma) U^T + b without forming W; x: (..., n), vt = V^T: (r, n) -> (..., m)."""
    return F.linear(F.linear(x, _as(vt, x)).mul_(sigma), _as(u, x), bias)


def _as(weight: Tensor, x: Tensor) -> Tensor:
    # an int8 weight says that it has that dtype already: torchao casts it inside the product
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


class FactoredLinear(nn.Module):
    """A linear layer in `factored` mode; u (m, r), vt (r, n) belong to every layer of a kind."""

    def __init__(self, u: Tensor, sigma: Tensor, vt: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.u, self.sigma, self.vt, self.bias = (
            nn.Parameter(t, requires_grad=False) for t in (u, sigma, vt, bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return factored_linear(x, self.u, self.sigma, self.vt, self.bias)


class MaterialisedLinear(nn.Module):
    """A linear layer in `materialised` mode: W (m, n) kept dense."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _as(self.weight, x), self.bias)


@torch.no_grad()
def serving_layers(
    genes: Learngenes, own: Own, mode: Mode, dtype: DType, compute: torch.dtype
) -> Iterator[nn.ModuleDict]:
    """Frozen layers in `mode`, sharing one copy of the U, V prefix when factored.

    Matrices are stored in `dtype`, Sigma and biases in `compute`. Raises ValueError for a
    materialised model in int8, and for dense layers that are not materialised.
    """
    if not executable(mode, dtype):
        raise ValueError("int8 is for factored models: W is never stored in it")
    if isinstance(own, DenseLayers):
        if mode is not Mode.MATERIALISED:
            raise ValueError("a refined model has no factors: its mode is materialised")
        yield from _dense_layers(own, dtype, compute)
        return
    u, v = ({kind: side[kind][:, : own.rank] for kind in Kind} for side in (genes.u, genes.v))
    if mode is Mode.FACTORED:
        stored_u = {kind: stored(u[kind], dtype, compute) for kind in Kind}
        stored_vt = {kind: stored(v[kind].T, dtype, compute) for kind in Kind}
    for layer in own.layers():
        modules: dict[str, nn.Module] = {}
        for kind in Kind:
            sigma, bias = (t.detach().to(compute) for t in (layer.sigma[kind], layer.bias[kind]))
            if mode is Mode.FACTORED:
                modules[kind] = FactoredLinear(stored_u[kind], sigma, stored_vt[kind], bias)
            else:
                weight = materialise(u[kind], layer.sigma[kind], v[kind])
                modules[kind] = MaterialisedLinear(stored(weight, dtype, compute), bias)
        release_memory(u[Kind.QKV].device)  # else the holes between kept matrices stay
        yield nn.ModuleDict(modules)


def _dense_layers(own: DenseLayers, dtype: DType, compute: torch.dtype) -> Iterator[nn.ModuleDict]:
    for index in range(own.depth):
        yield nn.ModuleDict(
            {
                kind: MaterialisedLinear(
                    stored(own.weight[kind][index], dtype, compute),
                    own.bias[kind][index].to(compute),
                )
                for kind in Kind
            }
        )


def stored(matrix: Tensor, dtype: DType, compute: torch.dtype) -> Tensor:
    """A matrix as a model of `dtype` keeps it."""
    if dtype is DType.INT8:
        for chatty in ("torchao", "torch.utils._pytree"):  # of kernels for other devices
            logging.getLogger(chatty).setLevel(logging.ERROR)
        from torchao.quantization import Int8Tensor, PerRow  # a second to import

        quantised: Tensor = Int8Tensor.from_hp(matrix.to(compute).contiguous(), PerRow())
        return quantised
    return matrix.to(torch.bfloat16 if dtype is DType.BFLOAT16 else torch.float32).contiguous()
