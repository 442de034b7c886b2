"""Configuration of a family: shapes, noise process, sizes, names of modes and dtypes; no torch."""

import functools
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

TIME_FREQUENCIES = 256
"""Number of sines and cosines that embed a timestep."""


class Kind(StrEnum):
    """The five kinds of weight matrix in a DiT block, W_k of shape (m_k, n_k); FINE section 3."""

    QKV = "qkv"
    O = "o"  # noqa: E741 - the paper's name
    IN = "in"
    OUT = "out"
    ADALN = "adaLN"

    def shape(self, width: int) -> tuple[int, int]:
        """Output and input features (m_k, n_k) at network width d."""
        m, n = _WIDTHS[self]
        return m * width, n * width


_WIDTHS = {Kind.QKV: (3, 1), Kind.O: (1, 1), Kind.IN: (4, 1), Kind.OUT: (1, 4), Kind.ADALN: (6, 1)}


class Frozen(BaseModel):
    """An immutable pydantic model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or list(values) != sorted(set(values)):
        raise ValueError("must be given, ascending and without repeats")
    return values


Ascending = Annotated[tuple[PositiveInt, ...], AfterValidator(_ascending)]


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the file and the fields."""


class Configuration(Frozen):
    """A configuration that people write as a TOML file."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and validate a file. Raises ConfigError."""
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
    """Shape of a family's autoencoder, in the words of diffusers' `AutoencoderKL`."""

    image_channels: PositiveInt = 3
    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    layers_per_block: PositiveInt = 1
    norm_num_groups: PositiveInt = 32
    scaling_factor: PositiveFloat
    """Factor that gives latents a variance of about one."""
    decoder_parameters: PositiveInt
    decode_bytes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Measured peak bytes while 1, 2, … images are decoded at once, up to `decoded_together`."""


class NetworkConfig(Frozen):
    """Shape of a family's diffusion transformer at its reference size."""

    sample_size: PositiveInt
    """Height and width of what is denoised: images or latents."""
    in_channels: PositiveInt
    """1 of grey images, 3 of coloured ones; or those of the latents."""
    patch_size: PositiveInt
    """Height and width of the patch of them that is one token."""
    width: PositiveInt
    """Features of a token."""
    num_attention_heads: PositiveInt
    """Heads, into which the width is divided."""
    num_classes: PositiveInt
    """Number of classes of the images."""
    depth: Annotated[int, Field(ge=2)]
    """Layers of the full size."""
    rank: PositiveInt
    """Components of U and V; up to several times the width."""
    autoencoder: AutoencoderConfig | None = Field(default=None, repr=False)
    """None where the network denoises images."""

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
    def full_size(self) -> "Size":
        return Size(depth=self.depth, rank=self.rank)

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2

    @property
    def hidden_states_bytes(self) -> int:
        """Bytes of the hidden states (tokens, width) of one image, in float32."""
        return 4 * self.tokens * self.width

    @property
    def image_size(self) -> int:
        """Height and width of an image, in pixels."""
        if self.autoencoder is None:
            return self.sample_size
        return self.sample_size << (len(self.autoencoder.block_out_channels) - 1)

    @property
    def image_channels(self) -> int:
        """Channels of an image: 1 or 3."""
        return self.in_channels if self.autoencoder is None else self.autoencoder.image_channels

    def with_classes(self, num_classes: int | None) -> Self:
        """This network for a data set of `num_classes` classes; None leaves it as it is."""
        return self if num_classes is None else self.model_copy(update={"num_classes": num_classes})

    @property
    def patch_values(self) -> int:
        """Number of scalars in one patch."""
        return self.patch_size**2 * self.in_channels


class DiffusionConfig(Frozen):
    """The noise process, in diffusers' scheduler words."""

    num_train_timesteps: PositiveInt = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"


class Scheduler(StrEnum):
    """Schedulers that turn noise into an image, under the names that requests use."""

    DDIM = "ddim"
    """Song et al., arXiv 2010.02502."""
    DPMSOLVER = "dpmsolver++"
    """DPM-Solver++ 2M, arXiv 2211.01095."""
    EULER = "euler"
    """Karras et al., arXiv 2206.00364, algorithm 1."""


class SizeSpace(Frozen):
    """Depths and rank prefixes that a family was trained for."""

    depths: Ascending
    """Numbers of layers that can be served."""
    ranks: Ascending
    """Numbers of components of U and V that a size may use, the first ones of them."""

    @property
    def smallest(self) -> "Size":
        return Size(depth=self.depths[0], rank=self.ranks[0])

    @property
    def middle(self) -> "Size":
        return Size(depth=self.depths[len(self.depths) // 2], rank=self.ranks[len(self.ranks) // 2])

    def require_rank(self, rank: int) -> None:
        """Raise ValueError when a rank prefix is longer than the network's rank."""
        if self.ranks[-1] > rank:
            raise ValueError(f"sizes.ranks go up to {self.ranks[-1]}, the network's rank is {rank}")


class Mode(StrEnum):
    """How a layer is executed: factor by factor, or with W written out."""

    FACTORED = "factored"
    MATERIALISED = "materialised"
    DENSE = "dense"
    """W as they were imported: executed as `materialised`, and shared with no other size."""

    @property
    def written_out(self) -> bool:
        return self is not Mode.FACTORED


SHARED_MODES = (Mode.FACTORED, Mode.MATERIALISED)
"""Modes of sizes that share U and V."""

GROUP = 32
"""Neighbouring inputs of one output that share a scale, in a matrix of few bits."""


class DType(StrEnum):
    """How the matrices of the blocks (U and V, or W) are stored.

    All else, activations included, is float32, unless the device computes natively in
    bfloat16: then a model that is not float32 is all bfloat16 but those matrices.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"
    INT3 = "int3"

    @functools.cached_property
    def bits(self) -> int | None:
        """Bits of a rounded weight; None for floats."""
        return {DType.INT8: 8, DType.INT4: 4, DType.INT3: 3}.get(self)

    @property
    def needs_healing(self) -> bool:
        """Whether rounding to so few bits costs quality that a Sigma of its own brings back."""
        return self.bits is not None and self.bits < 8


def executable(mode: Mode, dtype: DType) -> bool:
    """Whether a model can run so: W is too coarse in three bits."""
    return not (mode.written_out and dtype is DType.INT3)


class Size(Frozen):
    """Share of a family that a model uses."""

    depth: PositiveInt
    rank: PositiveInt

    def __str__(self) -> str:
        return f"depth {self.depth}, rank {self.rank}"

    def smaller_than(self, other: "Size") -> bool:
        """Whether this is no larger in either respect, and smaller in one."""
        return self != other and self.depth <= other.depth and self.rank <= other.rank


GuidanceScale = Annotated[float, Field(ge=1, le=20, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Sampling(Frozen):
    """How images are sampled from a model, in the words of requests and of diffusers' guiders.

    A guided step's prediction is that of the guide, and `guidance_scale` times what the model's
    differs from it.
    """

    num_inference_steps: PositiveInt = 25
    scheduler: Scheduler = Scheduler.DDIM
    guidance_scale: GuidanceScale = 2.0
    """Scale of guidance; 1 is unguided."""
    guidance_start: Share = 0.0
    guidance_stop: Share = 1.0
    """Interval of the steps that are guided (arXiv 2404.07724), as shares of their number."""
    guide: Size | None = None
    """Smaller size of the same family that guides (autoguidance, arXiv 2406.02507); None is the
    model itself without a class (classifier-free guidance, arXiv 2207.12598)."""

    @property
    def guided(self) -> range:
        """Steps that are guided, counted from 0; as diffusers' guiders round them."""
        if self.guidance_scale == 1:
            return range(0)
        shares = self.guidance_start, self.guidance_stop
        return range(*(int(share * self.num_inference_steps) for share in shares))


GUIDANCE_FIELDS = {"guidance_scale", "guidance_start", "guidance_stop", "guide"}


class SamplingRequest(BaseModel):
    """What a caller says of the sampling; None is left open."""

    num_inference_steps: PositiveInt | None = None
    scheduler: Scheduler | None = None
    guidance_scale: GuidanceScale | None = None
    """Scale of guidance; 1 is unguided, and halves the rows of a step."""
    guidance_start: Share | None = None
    guidance_stop: Share | None = None
    """Interval of the steps that are guided, as shares of their number: 0 and 1 by default."""
    guide: Size | None = None
    """Smaller size of the model's family that guides; by default the model itself does, without a
    class."""

    @model_validator(mode="after")
    def _forward(self) -> Self:
        asked = self.over(Sampling())
        if asked.guidance_start >= asked.guidance_stop:
            raise ValueError(
                f"guidance starts at {asked.guidance_start:g} of the steps and stops at "
                f"{asked.guidance_stop:g}: let it stop after it starts"
            )
        return self

    def over(self, chosen: Sampling) -> Sampling:
        """What was asked for, and for the rest what was chosen: guidance is one choice."""
        said = {
            name: value
            for name in Sampling.model_fields
            if (value := getattr(self, name)) is not None
        }
        if said.keys() & GUIDANCE_FIELDS:
            chosen = chosen.model_copy(update=Sampling().model_dump(include=GUIDANCE_FIELDS))
        return chosen.model_copy(update=said)
