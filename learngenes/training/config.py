"""Configurations of pre-training and condensation, which people write as TOML."""

from pathlib import Path
from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from learngenes.config import Configuration, DiffusionConfig, Frozen, NetworkConfig, SizeSpace


class DataConfig(Frozen):
    path: Path
    """Folder of the images: class folders, what `datasets` has saved, or IDX files."""
    class_names: tuple[str, ...] = ()
    """Names of IDX files' classes; folders and data sets have their own."""
    limited_images: PositiveInt = 2000
    """Images that become part of the family, for retraining Σ."""
    heldout_images: PositiveInt = 1000
    """Images that nothing is trained on: losses are measured on them."""
    licence: str
    """Licence of the images, which the family carries."""


class TrainingConfig(Frozen):
    steps: PositiveInt
    """Steps in which U, V, the stem and Σ are trained."""
    depths_from: float = Field(0.6, ge=0, le=1)
    """Share of the steps after which smaller depths are trained, too; 1 trains none."""
    batch_size: PositiveInt = 128
    """Images of each process in each step."""
    learning_rate: PositiveFloat = 5e-3
    """Learning rate of AdamW for the stem and biases, at the end of the warm-up."""
    sigma_learning_rate: PositiveFloat = 2e-2
    """The same for Σ."""
    factor_learning_rate: PositiveFloat = 0.03
    """Learning rate of Muon for U and V."""
    warmup_steps: PositiveInt = 200
    """Steps in which learning rates rise from zero."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the averaged weights, which are the family's; learning rates fall to zero, so that
    a long average would only lag behind."""
    clip_norm: PositiveFloat = 1.0
    """Norm to which gradients are clipped."""
    null_class_probability: float = Field(0.1, ge=0, le=1)
    """Share of images that are trained without their class, for guidance."""
    distillation: float = Field(1.0, ge=0, le=1)
    """Share of the full size's prediction in what a drawn size learns, or of a teacher's in what
    every size does; the rest is the data's."""
    preparation_steps: NonNegativeInt = 600
    """Steps in which, in the end, Sigma of each depth is trained alone."""
    healing_steps: NonNegativeInt = 300
    """Steps in which Sigma of each depth is then trained with matrices in few bits."""
    compiled: bool = True
    """Whether blocks are compiled, which takes half a minute and halves the time of a step."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Whether matrices are multiplied in bfloat16; `auto` where the device has it."""
    seed: int = 0
    """Seed of everything that is drawn."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of `log.jsonl`."""
    checkpoint_every_steps: PositiveInt = 250
    """Steps after which a checkpoint is written, from which a killed training goes on."""

    @property
    def depths_from_step(self) -> int:
        return round(self.depths_from * self.steps)


class TrainingError(Exception):
    """A training cannot go on; the message says what to change."""


class _NewFamilyConfig(Configuration):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name by which requests ask for the family."""
    data: DataConfig
    """Section of the images."""
    sizes: SizeSpace
    """Section of the depths and ranks that are to be served."""
    training: TrainingConfig
    """Section of the training."""


class PretrainingConfig(_NewFamilyConfig):
    """Configuration file of `fineserve pretrain`."""

    autoencoder: Path | None = None
    """Directory of diffusers' `AutoencoderKL`, for a family of latents."""
    network: NetworkConfig
    """Section of the network at its full size."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Section of the noise process, in the words of diffusers' schedulers."""

    @model_validator(mode="after")
    def _ranks_are_there(self) -> Self:
        self.sizes.require_rank(self.network.rank)
        return self

    def manifest(self, class_names: tuple[str, ...], trained_steps: int) -> dict[str, object]:
        """Fields of the manifest of a family that is trained so."""
        return {
            **self.model_dump(include={"name", "network", "diffusion", "sizes"}),
            "class_names": class_names,
            "licence": self.data.licence,
            "trained_steps": trained_steps,
            "seed": self.training.seed,
        }


class CondensationConfig(_NewFamilyConfig):
    """Configuration file of `fineserve condense`; the network is that of the teacher."""

    rank: PositiveInt
    """Rank of U and V."""
    diffusion: DiffusionConfig | None = None
    """Noise process; needed where the teacher has no scheduler beside it."""
    fit_iterations: PositiveInt = 100
    """Iterations of fitting U, V and Σ to the teacher's weights."""
    order_images: PositiveInt = 500
    """Images on which the order is found in which the teacher's layers leave."""
    calibration_seconds: NonNegativeFloat = 60
    """Seconds in which each calibrated size of the teacher's layers is trained."""

    @model_validator(mode="after")
    def _ranks_are_there(self) -> Self:
        self.sizes.require_rank(self.rank)
        return self
