"""A family's weights as a batch multiplies with them, and what each model adds to them."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from learngenes.config import DType, Kind, Mode, NetworkConfig
from learngenes.device import compute_dtype
from learngenes.family.family import Family
from learngenes.model.dense import materialised
from learngenes.model.dit import sinusoidal_timesteps
from learngenes.model.factors import CLASSES, DenseLayers, Own, Scales, materialise
from learngenes.model.frozen import stored, unpacked
from learngenes.stepping.arithmetic import BLOCK_KINDS

SPARE_RANKS = 8
"""Ranks that no model has: compiled kernels would tell a prefix from the whole."""


def kept(own: Own, family: Family, mode: Mode, dtype: DType) -> Own:
    """A model's own parameters as the engine keeps them: W that are rounded are always there."""
    if isinstance(own, Scales) and mode is Mode.MATERIALISED and dtype.bits is not None:
        return DenseLayers.of(materialised(family.genes, own), own.classes)
    return own


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


class SharedWeights:
    """Weights that all models of a family in one dtype share.

    The rank matters in few bits alone, whose groups are those of one rank prefix. Their matrices
    are kept in what is computed in, like all others: they are shared by every model.
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
        patch = stem.patch.weight.flatten(1).T.to(self.compute).contiguous()  # (P, D)
        final = stem.final.weight.T.to(self.compute).contiguous()  # (D, P)
        assert stem.patch.bias is not None
        self.embedder = patch, stem.patch.bias.detach(), stem.positions, self.network.patch_size
        """What `arithmetic.embed` takes beside the images."""
        self.final = final, stem.final.bias.detach()

    def _factors(self, kind: Kind, rank: int) -> tuple[Tensor, Tensor]:
        """Factors V (n, r) and U^T (r, m), zero beyond `rank`, so that all have the same shape."""
        genes = self.family.genes
        u, vt = (
            unpacked(stored(factor, self.dtype), self.compute)
            for factor in (genes.u[kind].detach()[:, :rank], genes.v[kind].detach()[:, :rank].T)
        )
        beyond = (0, 0, 0, self.network.rank + SPARE_RANKS - rank)
        return F.pad(vt, beyond).T.contiguous(), F.pad(u.T, beyond).contiguous()

    @property
    def nbytes(self) -> int:
        return nbytes((self.embedder[0], self.final[0], *itertools.chain(*self.factors.values())))


class ModelWeights(ABC):
    """Weights that one model owns, as a batch multiplies with them."""

    depth: int
    rank: int
    """Rank of the factors; 0 without any."""
    sigma: Tensor
    """Sigma of BLOCK_KINDS, (L, 4, r)."""
    bias: Tensor
    """Biases of BLOCK_KINDS, (L, 9D)."""
    adaln_bias: Tensor
    """Bias of adaLN, (L, 6D)."""
    materialised: tuple[Tensor, ...] | None
    """W^T of BLOCK_KINDS, (L, n, m) each; None while the model is factored."""

    def __init__(self, shared: SharedWeights, own: Own) -> None:
        self.shared = shared
        self.depth = own.depth
        tensors = own.stacked()
        bias = {kind: tensors[f"bias.{kind}"].to(shared.device, shared.compute) for kind in Kind}
        self.bias = torch.cat([bias[kind] for kind in BLOCK_KINDS], dim=1)
        self.adaln_bias = bias[Kind.ADALN]
        self.classes = None if own.classes is None else own.classes.detach().to(shared.device)
        """Class embeddings of the model's own; None where they are the family's."""
        self.used_at = 0
        """Counter of the last use, by which the model to evict is chosen."""

    @staticmethod
    def of(shared: SharedWeights, own: Own) -> "ModelWeights":
        if isinstance(own, DenseLayers):
            return DenseWeights(shared, own)
        return FactoredWeights(shared, own)

    @staticmethod
    def bytes_of(shared: SharedWeights, own: Own) -> int:
        """Bytes that `of` would hold."""
        layers = sum(t.numel() for k, t in own.stacked().items() if k != CLASSES)
        classes = 0 if own.classes is None else own.classes.nbytes
        return layers * shared.compute.itemsize + classes

    @property
    def nbytes(self) -> int:
        """Bytes that the model holds."""
        held = (*vars(self).values(), *(self.materialised or ()))
        return nbytes(t for t in held if isinstance(t, Tensor))

    @abstractmethod
    def modulations(self, timesteps: Tensor, class_label: int) -> Tensor:
        """Modulations of every step and layer, (S, L + 1, 6D): of the final layer the last, 2D."""

    @property
    def class_table(self) -> Tensor:
        """Class embeddings (C + 1, D), the null class last."""
        return self.shared.family.stem.classes.weight if self.classes is None else self.classes

    @property
    def null_class(self) -> int:
        return len(self.class_table) - 1

    def _conditioning(self, timesteps: Tensor, class_label: int) -> Tensor:
        """Conditioning (S, D), through SiLU."""
        stem = self.shared.family.stem
        times = stem.time_out(F.silu(stem.time_in(sinusoidal_timesteps(timesteps))))
        return F.silu(times + self.class_table[class_label])

    def _with_final(self, layers: Tensor, conditioning: Tensor) -> Tensor:
        final = self.shared.family.stem.final_modulation(conditioning)
        padded = F.pad(final, (0, layers.shape[2] - final.shape[1]))
        return torch.cat([layers, padded[:, None]], dim=1).to(self.shared.compute)


class FactoredWeights(ModelWeights):
    """Weights of a model with factors: Sigma and biases, and W once it is materialised."""

    def __init__(self, shared: SharedWeights, scales: Scales) -> None:
        super().__init__(shared, scales)
        self.rank = scales.rank
        tensors = {k: t.to(shared.device, shared.compute) for k, t in scales.stacked().items()}
        self.sigma = torch.stack([tensors[f"sigma.{kind}"] for kind in BLOCK_KINDS], dim=1)
        self.adaln_sigma = tensors[f"sigma.{Kind.ADALN}"]
        self.materialised = None

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
                unpacked(stored(materialise(u, sigma, v), shared.dtype), shared.compute)
                for sigma in self.sigma[:, index].float()
            ]
            written.append(torch.stack([w.T for w in layers]))
        self.materialised = tuple(written)

    def modulations(self, timesteps: Tensor, class_label: int) -> Tensor:
        """Modulations (S, L + 1, 6D); V's product is the same for all layers."""
        conditioning = self._conditioning(timesteps, class_label)
        v, ut = (factor.float() for factor in self.shared.factors[Kind.ADALN])
        reduced = conditioning @ v[:, : self.rank]  # (S, r)
        scaled = reduced[:, None] * self.adaln_sigma.float()  # (S, L, r)
        layers = scaled @ ut[: self.rank] + self.adaln_bias.float()
        return self._with_final(layers, conditioning)


class DenseWeights(ModelWeights):
    """Weights of a refined model: every W; none can be dropped and made again."""

    def __init__(self, shared: SharedWeights, own: DenseLayers) -> None:
        super().__init__(shared, own)
        self.rank, self.sigma = 0, self.bias.new_zeros(self.depth, len(BLOCK_KINDS), 0)
        self.materialised: tuple[Tensor, ...] = tuple(
            self._stored(own, kind).transpose(1, 2).contiguous() for kind in BLOCK_KINDS
        )
        self._adaln = self._stored(own, Kind.ADALN)

    def _stored(self, own: DenseLayers, kind: Kind) -> Tensor:
        """W of one kind (L, m, n), rounded to the dtype that it is stored in."""
        layers = (stored(w.to(self.shared.device), self.shared.dtype) for w in own.weight[kind])
        return torch.stack([unpacked(w, self.shared.compute) for w in layers])

    def modulations(self, timesteps: Tensor, class_label: int) -> Tensor:
        conditioning = self._conditioning(timesteps, class_label)
        layers = torch.einsum("sd,lmd->slm", conditioning, self._adaln.float())
        return self._with_final(layers + self.adaln_bias.float(), conditioning)
