"""Matrices kept in few bits: rounded in groups of inputs, each group with a scale of its own.

Symmetric and without a level at zero, so that all 2^bits levels are of use:
w = (code - 2^(bits - 1) + 1/2) * scale. The scale of a group is the best, by squared error, of a
few clips of its largest weight.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngenes.config import GROUP, Kind
from learngenes.model.factors import Learngenes

CLIPS = (1.0, 0.9, 0.8, 0.7)
PER_BYTE = 8


def codes_and_scales(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (m, n), uint8, and scales (m, n / GROUP), bfloat16; n is padded to whole groups."""
    groups = F.pad(matrix.float(), (0, -matrix.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    middle = 2 ** (bits - 1) - 0.5
    most = groups.abs().amax(2, keepdim=True).clamp(min=1e-12)
    least = torch.full_like(most, torch.inf)
    codes, scales = torch.zeros_like(groups), torch.ones_like(most)
    for clip in CLIPS:
        scale = (most * clip / middle).bfloat16().float()
        code = (groups / scale + middle).round().clamp(0, 2 * middle)
        error = ((code - middle) * scale - groups).square().sum(2, keepdim=True)
        better = error < least
        codes, scales = torch.where(better, code, codes), torch.where(better, scale, scales)
        least = torch.where(better, error, least)
    return codes.flatten(1).to(torch.uint8), scales[:, :, 0].bfloat16()


def _values(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Weights (m, n) of codes (m, n) and scales (m, n / GROUP)."""
    values = codes.to(dtype)
    groups = values.unflatten(1, (-1, GROUP)).sub_(2 ** (bits - 1) - 0.5)
    groups.mul_(scales.to(dtype)[:, :, None])
    return values


@torch.no_grad()
def nearest(matrix: Tensor, bits: int) -> Tensor:
    """A matrix (m, n), or several (…, m, n), as it comes back from so many bits; float32."""
    rows = matrix.detach().reshape(-1, matrix.shape[-1])
    values = _values(*codes_and_scales(rows, bits), bits, torch.float32)
    return values[:, : rows.shape[1]].reshape(matrix.shape)


def straight_through(matrix: Tensor, bits: int) -> Tensor:
    """`nearest`, with the gradient of the matrix itself (Bengio et al., arXiv 1308.3432)."""
    return matrix + (nearest(matrix, bits) - matrix).detach()


def rounded_genes(genes: Learngenes, rank: int, bits: int) -> Learngenes:
    """Factors of a rank prefix as a factored model in so many bits multiplies with them."""
    rounded = copy.deepcopy(genes)
    for kind in Kind:
        u, v = (side[kind].detach()[:, :rank] for side in (genes.u, genes.v))
        rounded.u[kind].data = nearest(u, bits)
        rounded.v[kind].data = nearest(v.T, bits).T
    return rounded


class Rounded(nn.Module):
    """A matrix (m, n) in 3, 4 or 8 bits; 3 are kept as planes of one bit, 4 two to a byte."""

    packed: Tensor
    scales: Tensor

    def __init__(self, matrix: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.inputs = bits, matrix.shape[1]
        codes, scales = codes_and_scales(matrix, bits)
        self.register_buffer("packed", _PACK[bits](codes))
        self.register_buffer("scales", scales)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The matrix as it was rounded. Needs as much again for a moment, in bytes of a code."""
        codes = _UNPACK[self.bits](self.packed)
        return _values(codes, self.scales, self.bits, dtype)[:, : self.inputs]


def _halves(codes: Tensor) -> Tensor:
    return codes[:, ::2] | codes[:, 1::2] << 4


def _of_halves(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def _planes(codes: Tensor) -> Tensor:
    """Bits of codes (m, n) as bytes (3, m, n / 8)."""
    places = torch.arange(PER_BYTE, dtype=torch.uint8, device=codes.device)
    bits = torch.stack([codes >> plane & 1 for plane in range(3)])
    planes: Tensor = (bits.unflatten(2, (-1, PER_BYTE)) << places).sum(3, dtype=torch.uint8)
    return planes


def _of_planes(packed: Tensor) -> Tensor:
    places = torch.arange(PER_BYTE, dtype=torch.uint8, device=packed.device)
    codes = torch.zeros_like(packed[0]).repeat_interleave(PER_BYTE, dim=1)
    for plane, kept in enumerate(packed):
        bits = (kept[:, :, None] >> places).bitwise_and_(1).flatten(1)
        codes.bitwise_or_(bits.bitwise_left_shift_(plane))
    return codes


def _bytes(codes: Tensor) -> Tensor:
    return codes


_PACK: dict[int, Callable[[Tensor], Tensor]] = {3: _planes, 4: _halves, 8: _bytes}
_UNPACK: dict[int, Callable[[Tensor], Tensor]] = {3: _of_planes, 4: _of_halves, 8: _bytes}
