"""The factors of FINE (arXiv 2409.19289, eq. 1): W_k^(l) = U_k diag(sigma_k^(l)) V_k^T.

U and V (the learngenes) are shared by all layers, sizes and tasks; a layer owns only its
sigma and its biases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learngenes.config import Kind, NetworkConfig

Linear = Callable[[Tensor], Tensor]
Layer = Mapping[Kind, Linear]
CLASSES = "classes"
"""Name on disk of the class embeddings of a model with classes of its own."""


class Learngenes(nn.Module):
    """One U (m_k, r) and one V (n_k, r) per kind."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.u = nn.ParameterDict()
        self.v = nn.ParameterDict()
        for kind in Kind:
            m, n = kind.shape(config.width)
            # Var(W) = r * std^4 = 2 / (m + n): Xavier's variance for the product at sigma = 1.
            std = (2 / ((m + n) * config.rank)) ** 0.25
            self.u[kind] = nn.Parameter(torch.randn(m, config.rank) * std)
            self.v[kind] = nn.Parameter(torch.randn(n, config.rank) * std)


class Scales(nn.Module):
    """Sigma and biases of every layer of one model: the parameters that it owns."""

    def __init__(
        self,
        sigma: Mapping[Kind, Tensor],
        bias: Mapping[Kind, Tensor],
        classes: Tensor | None = None,
    ) -> None:
        """sigma[k]: (L, r); bias[k]: (L, m_k); classes: (C + 1, D), the null class last,
        where the classes are not the family's."""
        super().__init__()
        self.classes = None if classes is None else nn.Parameter(classes.detach().clone())
        self.sigma, self.bias = _parameters(sigma), _parameters(bias)

    @property
    def depth(self) -> int:
        return len(self.sigma[Kind.QKV])

    @property
    def rank(self) -> int:
        return int(self.sigma[Kind.QKV].shape[1])

    def layers(self) -> list["LayerScales"]:
        return [
            LayerScales(
                {kind: self.sigma[kind][i] for kind in Kind},
                {kind: self.bias[kind][i] for kind in Kind},
            )
            for i in range(self.depth)
        ]

    def stacked(self) -> dict[str, Tensor]:
        """Tensors (L, r) and (L, m_k) by flat name, as they are kept on disk."""
        sigma, bias = (
            {kind: group[kind].detach().clone() for kind in Kind}
            for group in (self.sigma, self.bias)
        )
        classes = None if self.classes is None else self.classes.detach()
        return _flat(classes, sigma=sigma, bias=bias)

    @classmethod
    def from_stacked(cls, tensors: Mapping[str, Tensor]) -> "Scales":
        """Inverse of `stacked`. Raises KeyError when a tensor is missing."""
        return cls(_under("sigma", tensors), _under("bias", tensors), tensors.get(CLASSES))


def _parameters(group: Mapping[Kind, Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({kind: nn.Parameter(group[kind].detach().clone()) for kind in Kind})


def _flat(classes: Tensor | None, **groups: Mapping[Kind, Tensor]) -> dict[str, Tensor]:
    layers = {f"{name}.{k}": group[k].contiguous() for name, group in groups.items() for k in Kind}
    return layers if classes is None else {**layers, CLASSES: classes}


def _under(name: str, flat: Mapping[str, Tensor]) -> dict[Kind, Tensor]:
    return {kind: flat[f"{name}.{kind}"] for kind in Kind}


@dataclass(frozen=True)
class LayerScales:
    """sigma[k]: (r,) and bias[k]: (m_k,) of one layer."""

    sigma: Mapping[Kind, Tensor]
    bias: Mapping[Kind, Tensor]


@dataclass(frozen=True)
class DenseLayers:
    """W and biases of every layer of a model that shares none: refinement makes it of Scales."""

    weight: Mapping[Kind, Tensor]
    """W of each kind, (L, m, n)."""
    bias: Mapping[Kind, Tensor]
    """Biases of each kind, (L, m)."""
    classes: Tensor | None = None
    """Class embeddings (C + 1, D), the null class last; None where they are the family's."""

    @classmethod
    def of(
        cls, layers: Sequence[Mapping[Kind, tuple[Tensor, Tensor]]], classes: Tensor | None = None
    ) -> "DenseLayers":
        """Stack the W (m, n) and bias (m,) of each kind, layer by layer."""
        return cls(
            {kind: torch.stack([layer[kind][0] for layer in layers]) for kind in Kind},
            {kind: torch.stack([layer[kind][1] for layer in layers]) for kind in Kind},
            classes,
        )

    @property
    def depth(self) -> int:
        return len(self.bias[Kind.QKV])

    def layers(self) -> list[dict[Kind, tuple[Tensor, Tensor]]]:
        """W (m, n) and bias (m,) of each kind, layer by layer; inverse of `of`."""
        return [
            {kind: (self.weight[kind][i], self.bias[kind][i]) for kind in Kind}
            for i in range(self.depth)
        ]

    def subset(self, layers: Sequence[int]) -> "DenseLayers":
        """Some of the layers, of their own memory."""
        kept = torch.tensor(layers)
        return DenseLayers(
            {kind: self.weight[kind][kept] for kind in Kind},
            {kind: self.bias[kind][kept] for kind in Kind},
            self.classes,
        )

    def stacked(self) -> dict[str, Tensor]:
        """Tensors by flat name, as they are kept on disk."""
        return _flat(self.classes, weight=self.weight, bias=self.bias)

    @classmethod
    def from_stacked(cls, tensors: Mapping[str, Tensor]) -> "DenseLayers":
        """Inverse of `stacked`. Raises KeyError when a tensor is missing."""
        return cls(_under("weight", tensors), _under("bias", tensors), tensors.get(CLASSES))

    def to(self, device: torch.device) -> "DenseLayers":
        return self.from_stacked({k: tensor.to(device) for k, tensor in self.stacked().items()})


Own = Scales | DenseLayers
"""Parameters that one model does not share with its family."""


def own_from_stacked(tensors: Mapping[str, Tensor]) -> Own:
    """Scales or DenseLayers, whichever was `stacked`. Raises KeyError for a missing tensor."""
    kind = DenseLayers if f"weight.{Kind.QKV}" in tensors else Scales
    return kind.from_stacked(tensors)


def materialise(u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """W = U diag(sigma) V^T, (m, n)."""
    return (u * sigma) @ v.T
