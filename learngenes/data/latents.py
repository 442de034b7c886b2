"""Images as a network sees them: values in [-1, 1], or the latents of an autoencoder."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from learngenes.config import AutoencoderConfig, NetworkConfig
from learngenes.data.labelled import LabelledImages
from learngenes.device import decoded_together, default_device, peak_bytes
from learngenes.files import replaced
from learngenes.lazily import from_diffusers

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

ENCODED_TOGETHER = 32
DEFAULTS = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""Settings that a family's autoencoder must have, as Stable Diffusion's does."""


class AutoencoderError(ValueError):
    """A family cannot use this autoencoder; the message says why."""


def to_pixels(x: Tensor) -> Tensor:
    """Values in [-1, 1] as uint8, on the CPU."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def digest(stated: str, tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256(stated.encode())
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()


def new_autoencoder(network: NetworkConfig) -> "AutoencoderKL":
    """diffusers' `AutoencoderKL` with random weights, in the shape that `network` names."""
    config = network.autoencoder
    assert config is not None
    blocks = len(config.block_out_channels)
    made: AutoencoderKL = from_diffusers("AutoencoderKL")(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=network.in_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=network.image_size,
        scaling_factor=config.scaling_factor,
    )
    return made


class LatentDecoder(nn.Module):
    """Decoder: latents (N, C, H, W) of variance about one -> images (N, C', H', W') in [-1, 1]."""

    def __init__(self, network: NetworkConfig) -> None:
        super().__init__()
        whole = new_autoencoder(network)
        self.scaling_factor = whole.config.scaling_factor
        self.post_quant_conv, self.decoder = whole.post_quant_conv, whole.decoder
        self.requires_grad_(False).eval()

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.post_quant_conv(latents / self.scaling_factor))
        return images

    @torch.inference_mode()
    def pixels(self, latents: Tensor) -> Tensor:
        """Images (uint8, on the CPU), decoded a few at a time since the feature maps are large."""
        return torch.cat(
            [to_pixels(self(part)) for part in latents.split(decoded_together(latents.device))]
        )


class LatentEncoder(nn.Module):
    """Inverse of LatentDecoder: the means of the latents, without the noise around them."""

    def __init__(self, network: NetworkConfig) -> None:
        super().__init__()
        whole = new_autoencoder(network)
        self.scaling_factor = whole.config.scaling_factor
        self.encoder, self.quant_conv = whole.encoder, whole.quant_conv
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        mean, _ = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        latents: Tensor = mean * self.scaling_factor
        return latents

    @torch.inference_mode()
    def encoded(
        self,
        data: LabelledImages,
        device: torch.device | None = None,
        on_part: Callable[[], object] = lambda: None,
    ) -> LabelledImages:
        """The data as float16 latents, made on `device`; `on_part` hears of it, and may raise."""
        home = next(self.parameters()).device
        device = device or home
        latents = []
        self.to(device)
        try:
            for part in torch.arange(len(data)).split(ENCODED_TOGETHER):
                latents.append(self(data.normalised(part).to(device)).half().cpu())
                on_part()
        finally:
            self.to(home)
        return LabelledImages(torch.cat(latents).contiguous(), data.labels, data.class_names)

    def encoded_once(
        self, data: LabelledImages, directory: Path, device: torch.device | None = None
    ) -> LabelledImages:
        """`encoded`, kept in `directory` and found there again."""
        stated = repr((self.scaling_factor, data.images.shape))
        name = digest(stated, (*self.state_dict().values(), data.images))[:16]
        file = directory / f"latents-{name}.safetensors"
        with contextlib.suppress(FileNotFoundError, SafetensorError):  # not there, or not whole
            return LabelledImages(load_file(file)["latents"], data.labels, data.class_names)
        encoded = self.encoded(data, device)
        with replaced(file) as new:  # several processes may train together
            save_file({"latents": encoded.images}, new)
        return encoded


def joined(
    network: NetworkConfig, encoder: LatentEncoder, decoder: LatentDecoder
) -> "AutoencoderKL":
    """diffusers' `AutoencoderKL`, put together from its two halves."""
    whole = new_autoencoder(network)
    whole.load_state_dict({**encoder.state_dict(), **decoder.state_dict()})
    return whole.eval()


def read_autoencoder(
    directory: Path, network: NetworkConfig
) -> tuple[NetworkConfig, LatentEncoder, LatentDecoder]:
    """Load a directory of `AutoencoderKL.from_pretrained`, for a network of its latents.

    The network returned names the autoencoder's shape. Raises AutoencoderError.
    """
    try:
        whole = from_diffusers("AutoencoderKL").from_pretrained(directory, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise AutoencoderError(f"{directory} is not an AutoencoderKL: {error}") from error
    config = whole.config
    blocks = len(config.block_out_channels)
    wanted_of_all = {
        **DEFAULTS,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "out_channels": config.in_channels,
    }
    for name, wanted in wanted_of_all.items():
        stated = list(config[name]) if isinstance(wanted, list) else config[name]
        if stated != wanted:
            raise AutoencoderError(f"{directory}: its {name} is {config[name]!r}, not {wanted!r}")
    if config.latent_channels != network.in_channels:
        raise AutoencoderError(
            f"{directory} has latents of {config.latent_channels} channels; "
            f"the network's in_channels is {network.in_channels}"
        )

    def described(decoder_parameters: int, decode_bytes: tuple[int, ...]) -> NetworkConfig:
        autoencoder = AutoencoderConfig(
            image_channels=config.in_channels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            scaling_factor=config.scaling_factor,
            decoder_parameters=decoder_parameters,
            decode_bytes=decode_bytes,
        )
        return network.model_copy(update={"autoencoder": autoencoder})

    unmeasured = described(1, (1,))
    encoder, decoder = LatentEncoder(unmeasured), LatentDecoder(unmeasured)
    for half in (encoder, decoder):
        half.load_state_dict({key: whole.state_dict()[key] for key in half.state_dict()})
    parameters = sum(p.numel() for p in decoder.parameters())
    return described(parameters, _decode_bytes(decoder, unmeasured)), encoder, decoder


def _decode_bytes(decoder: LatentDecoder, network: NetworkConfig) -> tuple[int, ...]:
    """Peak bytes while 1, 2, … images are decoded at once, weights not counted."""
    device = default_device()
    decoder.to(device)
    most = decoded_together(device)
    shape = (most, network.in_channels, network.sample_size, network.sample_size)
    latents = torch.zeros(shape, device=device)
    decoder.pixels(latents)  # what is set up once is not an image's
    return tuple(
        peak_bytes(lambda n=n: decoder.pixels(latents[:n]), device)  # type: ignore[misc]
        for n in range(1, most + 1)
    )
