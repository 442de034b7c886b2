"""What a family is made of, as validated data: shapes, diffusion process, sizes. No torch here."""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

TIME_FREQUENCIES = 256
"""Sines and cosines that a timestep is embedded with."""


class Kind(StrEnum):
    """The five kinds of weight matrix in a DiT block, W_k of shape (m_k, n_k); FINE section 3."""

    QKV = "qkv"
    O = "o"  # noqa: E741 - the paper's name
    IN = "in"
    OUT = "out"
    ADALN = "adaLN"

    def shape(self, width: int) -> tuple[int, int]:
        """(m_k, n_k): output and input features at network width d."""
        m, n = _WIDTHS[self]
        return m * width, n * width


_WIDTHS = {
    Kind.QKV: (3, 1),
    Kind.O: (1, 1),
    Kind.IN: (4, 1),
    Kind.OUT: (1, 4),
    Kind.ADALN: (6, 1),
}


class Frozen(BaseModel):
    """Immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the fields."""


class Configuration(Frozen):
    """What somebody writes as a TOML file."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ConfigError."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except ValidationError as error:
            wrong = (
                f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}"
                for problem in error.errors()
            )
            raise ConfigError(f"{path} cannot be used: {'; '.join(wrong)}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error


class AutoencoderConfig(Frozen):
    """What makes images of a network's latents: diffusers' `AutoencoderKL`, in its words."""

    image_channels: PositiveInt = 3
    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    layers_per_block: PositiveInt = 1
    norm_num_groups: PositiveInt = 32
    scaling_factor: PositiveFloat
    """Latents are multiplied by it, for a variance of about one."""
    decoder_parameters: PositiveInt
    decode_bytes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """At most alive while one image is decoded, two, and as many as are at once; as measured."""


class NetworkConfig(Frozen):
    """Shape of a family's diffusion transformer at its reference size."""

    sample_size: PositiveInt
    """Of what it denoises, images or latents: height and width."""
    in_channels: PositiveInt
    patch_size: PositiveInt
    width: PositiveInt
    num_attention_heads: PositiveInt
    num_classes: PositiveInt
    depth: Annotated[int, Field(ge=2)]
    rank: PositiveInt
    autoencoder: AutoencoderConfig | None = Field(default=None, repr=False)
    """Of a network of latents."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.num_attention_heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        return self

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2

    @property
    def image_size(self) -> int:
        """Height and width, in pixels."""
        if self.autoencoder is None:
            return self.sample_size
        return self.sample_size << (len(self.autoencoder.block_out_channels) - 1)

    @property
    def image_channels(self) -> int:
        """1 or 3."""
        return self.in_channels if self.autoencoder is None else self.autoencoder.image_channels

    def with_classes(self, num_classes: int | None) -> Self:
        """The same network for a data set of other classes; None: as it is."""
        return self if num_classes is None else self.model_copy(update={"num_classes": num_classes})

    @property
    def patch_values(self) -> int:
        """Scalars in one patch."""
        return self.patch_size**2 * self.in_channels


class DiffusionConfig(Frozen):
    """The noise process, in diffusers' scheduler words."""

    num_train_timesteps: PositiveInt = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"


class Scheduler(StrEnum):
    """How noise becomes an image; the names are those of the requests."""

    DDIM = "ddim"
    """Song et al., arXiv 2010.02502."""
    DPMSOLVER = "dpmsolver++"
    """DPM-Solver++ 2M, arXiv 2211.01095."""
    EULER = "euler"
    """Karras et al., arXiv 2206.00364, algorithm 1."""


class SizeSpace(Frozen):
    """The depths and rank prefixes that a family was trained for."""

    depths: tuple[PositiveInt, ...]
    ranks: tuple[PositiveInt, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("depths", "ranks"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be given, ascending and without repeats")
        return self

    def require_rank(self, rank: int) -> None:
        """Raises ValueError when a prefix is longer than what it is one of."""
        if self.ranks[-1] > rank:
            raise ValueError(f"sizes.ranks go up to {self.ranks[-1]}, the network's rank is {rank}")


class Mode(StrEnum):
    """How a layer is executed: factor by factor, or with W written out."""

    FACTORED = "factored"
    MATERIALISED = "materialised"


class DType(StrEnum):
    """How the matrices of the blocks (U and V, or W) are stored.

    All else, activations included, is float32, unless the device computes natively in
    bfloat16: then a bfloat16 or int8 model is all bfloat16 but those matrices.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


def executable(mode: Mode, dtype: DType) -> bool:
    """int8 is for U and V: W is never stored in it."""
    return not (mode is Mode.MATERIALISED and dtype is DType.INT8)


class Size(Frozen):
    """How much of a family a model uses."""

    depth: PositiveInt
    rank: PositiveInt
