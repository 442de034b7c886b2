"""A family's weights as a batch multiplies with them, and what each model adds to them."""

import itertools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from learngenes.config import DType, Kind, NetworkConfig
from learngenes.device import compute_dtype
from learngenes.dit import sinusoidal_timesteps
from learngenes.factors import Scales, materialise, stored
from learngenes.family import Family
from learngenes.mixed import BLOCK_KINDS

SPARE_RANKS = 8


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class SharedWeights:
    """What all models of a family that are stored in one dtype have in common.

    The rank matters for int8 alone, whose scales are those of one rank prefix. Its matrices are
    kept in what is computed in, like all others: they are shared by every model.
    """

    def __init__(self, family: Family, dtype: DType, rank: int | None = None) -> None:
        self.family, self.dtype = family, dtype
        self.network: NetworkConfig = family.manifest.network
        self.device = family.stem.positions.device
        self.compute = compute_dtype(dtype, self.device)
        self.factors = {kind: self._factors(kind, rank or self.network.rank) for kind in Kind}
        self.block_factors = tuple(self.factors[kind] for kind in BLOCK_KINDS)
        stem = family.stem
        self.heads = self.network.num_attention_heads
        self.positions = stem.positions
        self.patch = stem.patch.weight.flatten(1).T.to(self.compute).contiguous()  # (P, D)
        assert stem.patch.bias is not None
        self.patch_bias = stem.patch.bias.detach()
        self.final = stem.final.weight.T.to(self.compute).contiguous()  # (D, P)
        self.final_bias = stem.final.bias.detach()

    def _factors(self, kind: Kind, rank: int) -> tuple[Tensor, Tensor]:
        """V (n, r) and U^T (r, m); zero beyond `rank`, so that all have the same shape.

        A rank's prefix is never the whole: a compiled kernel would tell the two apart.
        """
        genes = self.family.genes
        u = stored(genes.u[kind].detach()[:, :rank], self.dtype, self.compute)
        vt = stored(genes.v[kind].detach()[:, :rank].T, self.dtype, self.compute)
        if self.dtype is DType.INT8:
            u, vt = u.dequantize(), vt.dequantize()
        beyond = (0, 0, 0, self.network.rank + SPARE_RANKS - rank)
        ut = F.pad(u.to(self.compute).T, beyond)
        return F.pad(vt.to(self.compute), beyond).T.contiguous(), ut.contiguous()

    @property
    def nbytes(self) -> int:
        own = (self.patch, self.final, *itertools.chain(*self.factors.values()))
        return nbytes(own)


class ModelWeights:
    """What one model owns: Sigma and biases; and W of each layer, once it is materialised."""

    def __init__(self, shared: SharedWeights, scales: Scales) -> None:
        self.shared = shared
        self.depth, self.rank = scales.depth, scales.rank
        tensors = {
            name: tensor.to(shared.device, shared.compute)
            for name, tensor in scales.stacked().items()
        }
        self.sigma = torch.stack([tensors[f"sigma.{kind}"] for kind in BLOCK_KINDS], dim=1)
        self.bias = torch.cat([tensors[f"bias.{kind}"] for kind in BLOCK_KINDS], dim=1)
        self.adaln_sigma = tensors[f"sigma.{Kind.ADALN}"]
        self.adaln_bias = tensors[f"bias.{Kind.ADALN}"]
        self.used_at = 0
        """For whoever has to choose which model is to go."""
        self.materialised: tuple[Tensor, ...] | None = None
        """W^T of each of BLOCK_KINDS, (L, n, m)."""

    @property
    def nbytes(self) -> int:
        return nbytes((self.sigma, self.bias, self.adaln_sigma, self.adaln_bias))

    @property
    def materialised_nbytes(self) -> int:
        d, element = self.shared.network.width, self.bias.element_size()
        return self.depth * element * sum(math.prod(kind.shape(d)) for kind in BLOCK_KINDS)

    def materialise(self) -> None:
        """Write every W out, from Sigma as it is kept here: rounded to what is computed in."""
        shared, genes = self.shared, self.shared.family.genes
        written = []
        for index, kind in enumerate(BLOCK_KINDS):
            u, v = (side[kind].detach()[:, : self.rank] for side in (genes.u, genes.v))
            layers = [
                stored(materialise(u, self._sigma(index)[layer], v), shared.dtype, shared.compute)
                for layer in range(self.depth)
            ]
            written.append(torch.stack([w.T.to(shared.compute) for w in layers]))
        self.materialised = tuple(written)

    def _sigma(self, index: int) -> Tensor:
        return self.sigma[:, index].float()

    def modulations(self, timesteps: Tensor, class_label: int) -> Tensor:
        """Of every step and layer in one product: (S, L + 1, 6D).

        V's side is the same for all layers. The last entry of a step is the final layer's, 2D.
        """
        shared, stem = self.shared, self.shared.family.stem
        times = stem.time_out(F.silu(stem.time_in(sinusoidal_timesteps(timesteps))))
        conditioning = F.silu(times + stem.classes.weight[class_label])  # (S, D)
        v, ut = (factor.float() for factor in shared.factors[Kind.ADALN])
        reduced = conditioning @ v[:, : self.rank]  # (S, r)
        scaled = reduced[:, None] * self.adaln_sigma.float()  # (S, L, r)
        layers = scaled @ ut[: self.rank] + self.adaln_bias.float()
        final = stem.final_modulation(conditioning)
        padded_final = F.pad(final, (0, layers.shape[2] - final.shape[1]))
        return torch.cat([layers, padded_final[:, None]], dim=1).to(shared.compute)
