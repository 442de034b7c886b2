"""The diffusion transformer (DiT, arXiv 2212.09748) around the factors.

Numerically the network of diffusers' `DiTTransformer2DModel`, with one shared time and class
embedder where diffusers keeps a copy in each block. The forward pass reads top to bottom;
N images, T tokens, D width, C channels, H = W = sample_size, P = patch_size.
"""

import copy
import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngenes import device
from learngenes.config import TIME_FREQUENCIES, DType, Kind, Mode, NetworkConfig
from learngenes.data.latents import LatentDecoder, to_pixels
from learngenes.device import compute_dtype
from learngenes.model.factors import Layer, Learngenes, Own
from learngenes.model.frozen import serving_layers


def sinusoidal_positions(width: int, grid: int) -> Tensor:
    """2D sine-cosine position embedding, (grid^2, width): half for columns, half for rows."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    columns = line.repeat(grid, 1)
    rows = line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def sinusoidal_timesteps(timesteps: Tensor) -> Tensor:
    """Embedding of timesteps: (N,) -> (N, TIME_FREQUENCIES), cosines first."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / (half - 1)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm, then a shift and a scale of each image's own. x: (N, T, D); others (N, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def attention(x: Tensor, layer: Layer, heads: int) -> Tensor:
    n, t, d = x.shape
    qkv = layer[Kind.QKV](x).view(n, t, 3, heads, d // heads)  # (N, T, 3, heads, D/heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = device.attention(q, k, v)  # (N, heads, T, D/heads)
    return layer[Kind.O](mixed.transpose(1, 2).reshape(n, t, d))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation; compiled, a sigmoid takes a third of the time of a tanh."""
    if not torch.compiler.is_dynamo_compiling():
        return F.gelu(x, approximate="tanh")
    slope = 2 * math.sqrt(2 / math.pi)
    y = x.float()
    return (y * torch.sigmoid(y * (slope + slope * 0.044715 * (y * y)))).to(x.dtype)


def feed_forward(x: Tensor, layer: Layer) -> Tensor:
    return layer[Kind.OUT](gelu(layer[Kind.IN](x)))


def block(x: Tensor, modulation: Tensor, layer: Layer, heads: int) -> Tensor:
    """One adaLN-Zero block. x: (N, T, D); modulation: (N, 6D)."""
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=1)
    x = x + gate_a[:, None] * attention(modulate(x, shift_a, scale_a, 1e-6), layer, heads)
    return x + gate_f[:, None] * feed_forward(modulate(x, shift_f, scale_f, 1e-5), layer)


class Stem(nn.Module):
    """A DiT without its blocks: patch, position, time and class embedders, final layer."""

    positions: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.patch = nn.Conv2d(config.in_channels, d, config.patch_size, stride=config.patch_size)
        positions = sinusoidal_positions(d, config.sample_size // config.patch_size)
        self.register_buffer("positions", positions, persistent=False)
        self.time_in = nn.Linear(TIME_FREQUENCIES, d)
        self.time_out = nn.Linear(d, d)
        self.classes = nn.Embedding(config.num_classes + 1, d)  # the last one is the null class
        self.final_modulation = nn.Linear(d, 2 * d)
        self.final = nn.Linear(d, config.patch_values)
        self.decoder = None if config.autoencoder is None else LatentDecoder(config)
        for embedding in (self.classes, self.time_in, self.time_out):  # as DiT does
            nn.init.normal_(embedding.weight, std=0.02)
        for zero in (self.final_modulation, self.final):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def with_classes(self, table: Tensor) -> "Stem":
        """A stem that shares everything with this one but the class embeddings.

        table: (num_classes + 1, D), the null class last; a Parameter is trained.
        """
        other = copy.copy(self)
        other._modules = dict(self._modules)
        num_classes, width = len(table) - 1, table.shape[1]
        other.classes = nn.Embedding(num_classes + 1, width, _weight=table)
        if isinstance(table, nn.Parameter):  # itself, and not another one of the same data
            other.classes.weight = table
        other.config = self.config.model_copy(update={"num_classes": num_classes})
        return other

    def forward(
        self, x: Tensor, timesteps: Tensor, class_labels: Tensor, layers: Iterable[Layer]
    ) -> Tensor:
        """x: (N, C, H, W); timesteps, class_labels: (N,) -> prediction (N, C, H, W)."""
        h, conditioning = self.embed(x, timesteps, class_labels)
        for layer in layers:
            h = block(h, layer[Kind.ADALN](conditioning), layer, self.config.num_attention_heads)
        return self.finish(h, conditioning)

    def embed(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) of noisy images, and what conditions every block, (N, D)."""
        h = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        time = self.time_in(sinusoidal_timesteps(timesteps).to(h.dtype))
        return h, F.silu(self.time_out(F.silu(time)) + self.classes(class_labels))

    def finish(self, h: Tensor, conditioning: Tensor) -> Tensor:
        """Prediction (N, C, H, W) of what the last block gives."""
        shift, scale = self.final_modulation(conditioning).chunk(2, dim=1)
        return self._unpatch(self.final(modulate(h, shift, scale, 1e-6)))

    def pixels(self, x: Tensor) -> Tensor:
        """Denoised (N, C, H, W) as images: uint8, on the CPU."""
        return to_pixels(x) if self.decoder is None else self.decoder.pixels(x)

    def in_dtype(self, dtype: torch.dtype) -> "Stem":
        """A copy in `dtype` that shares the decoder, which is always float32."""
        memo: dict[int, object] = {} if self.decoder is None else {id(self.decoder): None}
        other = copy.deepcopy(self, memo).to(dtype)
        other.decoder = self.decoder
        return other

    def _unpatch(self, h: Tensor) -> Tensor:
        """Patches (N, T, P*P*C) -> images (N, C, H, W)."""
        c = self.config
        grid = c.sample_size // c.patch_size
        h = h.view(-1, grid, grid, c.patch_size, c.patch_size, c.in_channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.in_channels, c.sample_size, c.sample_size)


class DiT(nn.Module):
    """A model of one size, ready to sample: a stem and `depth` frozen layers in one mode."""

    def __init__(
        self, stem: Stem, genes: Learngenes, own: Own, mode: Mode, dtype: DType = DType.FLOAT32
    ) -> None:
        super().__init__()
        self.config = stem.config
        self.compute = compute_dtype(dtype, stem.positions.device)
        self.stem = stem if self.compute == torch.float32 else stem.in_dtype(self.compute)
        self.layers = nn.ModuleList(serving_layers(genes, own, mode, dtype, self.compute))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """x: (N, C, H, W); timesteps, class_labels: (N,) -> prediction (N, C, H, W)."""
        layers = cast(Iterable[Layer], self.layers)
        prediction: Tensor = self.stem(x.to(self.compute), timesteps, class_labels, layers)
        return prediction.to(x.dtype)
