"""Other ways to keep a matrix in few bits, of no more bytes than ours.

Each maps a matrix (m, n) to what it comes back as. Ours has a group of 32 inputs for each bfloat16
scale: half a bit a number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from learngenes.config import GROUP
from learngenes.model.rounded import nearest
from learngenes.sizing.cost import rounded_bytes

WIDE = 2 * GROUP
"""Group of those that keep something else beside a scale."""
HQQ_ITERATIONS, HQQ_NORM, HQQ_BETA, HQQ_GROWTH = 20, 0.7, 10.0, 1.01


def round_to_nearest(matrix: Tensor, bits: int) -> Tensor:
    """Ours before it is healed: symmetric, the best of four clips."""
    return nearest(matrix, bits)


def min_max(matrix: Tensor, bits: int) -> Tensor:
    """A scale and a zero point for every 64, between the least and the largest."""
    groups, scale, zero = _asymmetric(matrix, bits)
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    return _back((codes - zero) * scale, matrix)


def half_quadratic(matrix: Tensor, bits: int) -> Tensor:
    """HQQ (Badri and Shaji 2023): zero points that make the error sparse; groups of 64."""
    groups, scale, zero = _asymmetric(matrix, bits)
    beta = HQQ_BETA
    for _ in range(HQQ_ITERATIONS):
        codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
        error = groups - (codes - zero) * scale
        shrunk = error.abs() - error.abs().clamp(min=1e-8).pow(HQQ_NORM - 1) / beta
        sparse = error.sign() * shrunk.clamp(min=0)
        zero = (codes - (groups - sparse) / scale).mean(2, keepdim=True)
        beta *= HQQ_GROWTH
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    return _back((codes - zero.bfloat16().float()) * scale, matrix)


def low_rank(matrix: Tensor, bits: int) -> Tensor:
    """Rounded in groups of 64, and the residual's largest components in what bytes are left."""
    rounded = _wide(matrix, bits)
    left, values, right = torch.linalg.svd(matrix.float() - rounded, full_matrices=False)
    rows, inputs = matrix.shape
    kept = low_rank_components(rows, inputs, bits)
    repair = (left[:, :kept] * values[:kept]).bfloat16().float() @ right[:kept].bfloat16().float()
    return rounded + repair


def low_rank_components(rows: int, inputs: int, bits: int) -> int:
    """Components, in bfloat16, that wider groups leave room for; rounded up in its favour."""
    wide = rows * -(-inputs // WIDE) * (WIDE * bits // 8 + 2)
    spare = rounded_bytes(rows, inputs, bits) - wide
    return max(0, -(-int(spare) // (2 * (rows + inputs))))


def _wide(matrix: Tensor, bits: int) -> Tensor:
    """Rounded as ours, with a scale for every 64."""
    padded = F.pad(matrix.float(), (0, -matrix.shape[1] % WIDE))
    groups = padded.reshape(-1, WIDE)
    middle, best = 2 ** (bits - 1) - 0.5, torch.zeros_like(groups)
    least = torch.full((len(groups), 1), torch.inf)
    for clip in (1.0, 0.9, 0.8, 0.7):
        most = groups.abs().amax(1, keepdim=True).clamp(min=1e-12)
        scale = (most * clip / middle).bfloat16().float()
        value = ((groups / scale + middle).round().clamp(0, 2 * middle) - middle) * scale
        error = (value - groups).square().sum(1, keepdim=True)
        best = torch.where(error < least, value, best)
        least = torch.minimum(error, least)
    return best.view_as(padded)[:, : matrix.shape[1]]


def _asymmetric(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups (m, g, 64), their scales and zero points (m, g, 1)."""
    groups = F.pad(matrix.float(), (0, -matrix.shape[1] % WIDE)).unflatten(1, (-1, WIDE))
    least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).clamp(min=1e-12).bfloat16().float()
    return groups, scale, (-least / scale).bfloat16().float()


def _back(groups: Tensor, matrix: Tensor) -> Tensor:
    return groups.flatten(1)[:, : matrix.shape[1]]


RIVALS = {
    "rounded": round_to_nearest,
    "min-max": min_max,
    "HQQ": half_quadratic,
    "low rank": low_rank,
}
