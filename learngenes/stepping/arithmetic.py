"""One denoising step for rows of different models of a family: its parts, as pure functions.

A row is one image at one step; a guided image has a second, unconditional one. Rows of a lane
(`lanes`) share every matrix product: factored layers differ only in a scale between two
common products, `((x V) * sigma[row]) U^T + b[row]` (FINE, eq. 1), and materialised ones of several
models are one batched product. No function here mixes rows, and each is the network of
`learngenes.model.dit`.

N rows, T tokens, D width, M models, r rank, P values in a patch. Products run in the dtype of
their operands, all else in float32.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from learngenes.config import Kind
from learngenes.stepping.schedules import step

BLOCK_KINDS = (Kind.QKV, Kind.O, Kind.IN, Kind.OUT)
"""Kinds that a block multiplies tokens with; adaLN's are made once for a whole schedule."""
LOG2_E = math.log2(math.e)
FEW_TOKENS = 64
"""Most tokens for which explicit scores beat the tiles of a fused attention kernel."""

Product = Callable[[Tensor, int], Tensor]
"""Product: (tokens (..., T, n), index into BLOCK_KINDS) -> (..., T, m), float32, with bias."""


def split_bias(bias: Tensor) -> tuple[Tensor, ...]:
    """Biases (..., 9D) -> (..., m) of each of BLOCK_KINDS."""
    width = bias.shape[-1] // 9
    return torch.split(bias, [kind.shape(width)[0] for kind in BLOCK_KINDS], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm, shift and scale; x: (..., T, D); shift, scale: (..., D) -> (..., T, D) float32."""
    normalised = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return normalised * (1 + scale.float()[..., None, :]) + shift.float()[..., None, :]


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, by tanh(z) = 2 / (1 + exp(-2 z)) - 1.

    Compiled for a CPU, an exponential takes a third of the time of a hyperbolic tangent, and one
    to the base of two is the cheapest.
    """
    slope = -2 * math.sqrt(2 / math.pi) * LOG2_E
    return x / (1 + torch.exp2(x * (slope + slope * 0.044715 * (x * x))))


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention over q, k and v: (..., T, 3D) -> (..., T, D)."""
    *rows, t, width = qkv.shape
    d = width // 3 // heads
    # contiguous, (N heads, T, d) each: products then need no copy of their own
    q, k, v = qkv.view(-1, t, 3, heads, d).permute(2, 0, 3, 1, 4).reshape(3, -1, t, d)
    if t > FEW_TOKENS:
        by_row = (x.view(-1, heads, t, d) for x in (q, k, v))  # the fused kernel wants all four
        mixed = F.scaled_dot_product_attention(*by_row).flatten(0, 1)
    else:
        # scaled after the largest was taken, and divided after the product: less for each score
        scores = torch.bmm(q, k.transpose(1, 2)).float()
        scale = LOG2_E * d**-0.5
        weights = torch.exp2((scores - scores.amax(dim=-1, keepdim=True)) * scale)
        mixed = torch.bmm(weights.to(v.dtype), v).float() / weights.sum(dim=-1, keepdim=True)
    mixed = mixed.to(v.dtype).view(-1, heads, t, d).transpose(1, 2)
    return mixed.reshape(*rows, t, width // 3)


def block(x: Tensor, modulation: Tensor, product: Product, heads: int) -> Tensor:
    """One adaLN-Zero block. x: (..., T, D); modulation: (..., 6D)."""
    dtype = x.dtype
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
    qkv = product(modulate(x, shift_a, scale_a, 1e-6).to(dtype), 0).to(dtype)
    h = x.float() + gate_a.float()[..., None, :] * product(attention(qkv, heads), 1)
    features = product(modulate(h, shift_f, scale_f, 1e-5).to(dtype), 2)
    hidden = gelu(features).to(dtype)
    return (h + gate_f.float()[..., None, :] * product(hidden, 3)).to(dtype)


def materialised_block(
    x: Tensor, modulation: Tensor, weights: tuple[Tensor, ...], bias: Tensor, heads: int
) -> Tensor:
    """A block with W written out, for M models of R rows each.

    x: (M, R, T, D); modulation: (M, R, 6D); weights: W^T (M, n, m) of each kind; bias: (M, 9D).
    """
    biases = split_bias(bias)

    def product(tokens: Tensor, kind: int) -> Tensor:
        models, rows, t, inputs = tokens.shape
        if models == 1:
            y = tokens.view(rows * t, inputs) @ weights[kind][0]
        else:
            y = torch.bmm(tokens.view(models, rows * t, inputs), weights[kind])
        return y.view(models, rows, t, -1).float() + biases[kind].float()[:, None, None]

    return block(x, modulation, product, heads)


def factored_block(
    x: Tensor,
    modulation: Tensor,
    factors: tuple[tuple[Tensor, Tensor], ...],
    sigma: Tensor,
    bias: Tensor,
    heads: int,
) -> Tensor:
    """A block factor by factor, for N rows of any models.

    x: (N, T, D); modulation: (N, 6D); factors: V (n, R) and U^T (R, m) of each kind;
    sigma: (N, 4, r), r <= R; bias: (N, 9D).
    """
    biases = split_bias(bias)
    rank = sigma.shape[2]

    def product(tokens: Tensor, kind: int) -> Tensor:
        v, ut = factors[kind]
        n, t, inputs = tokens.shape
        reduced = (tokens.view(n * t, inputs) @ v[:, :rank]).view(n, t, -1).float()
        scaled = (reduced * sigma[:, kind, None].float()).to(x.dtype)
        y = scaled.view(n * t, -1) @ ut[:rank]
        return y.view(n, t, -1).float() + biases[kind].float()[:, None]

    return block(x, modulation, product, heads)


def embed(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int) -> Tensor:
    """Noisy images (N, C, H, W) -> tokens (N, T, D). weight: (P, D)."""
    n, c, size, _ = x.shape
    grid = size // patch_size
    patches = x.view(n, c, grid, patch_size, grid, patch_size).permute(0, 2, 4, 1, 3, 5)
    tokens = patches.reshape(n * grid * grid, -1).to(weight.dtype) @ weight
    embedded = tokens.view(n, grid * grid, -1).float() + bias.float() + positions.float()
    return embedded.to(weight.dtype)


def finish(
    h: Tensor,
    modulation: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    previous: Tensor,
    coefficients: Tensor,
    guidance: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
) -> tuple[Tensor, Tensor]:
    """The final layer, guidance (arXiv 2207.12598) and the schedulers' step: (next x, x0).

    h: (N, T, D); modulation: (N, 2D); weight: (D, P); x, previous: (I, C, H, W), of images whose
    rows are `conditional` and `unconditional` (I,), the same one where there is no guidance.
    """
    n, t, d = h.shape
    shift, scale = modulation.chunk(2, dim=1)
    tokens = modulate(h, shift, scale, 1e-6).to(h.dtype).view(n * t, d) @ weight
    rows = tokens.view(n, t, -1).float() + bias.float()
    guided = torch.lerp(rows[unconditional], rows[conditional], guidance[:, None, None])
    images, c, size, _ = x.shape
    grid = round(t**0.5)
    patch = size // grid
    prediction = guided.view(images, grid, grid, patch, patch, c).permute(0, 5, 1, 3, 2, 4)
    return step(x, prediction.reshape(x.shape), previous, coefficients)
